// Numbers and tokens, as people read them.

const LEAST = -9999; // the API's logarithm of 0

export function number(value, digits = 2) {
  return value === null ? "–" : value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−");
}

export function probability(logprob) {
  return logprob === null || logprob <= LEAST ? 0 : Math.exp(logprob);
}

export function percent(logprob) {
  if (logprob === null) return "–";
  const share = 100 * probability(logprob);
  return share > 0 && share < 0.01 ? "<0.01" : share.toFixed(share < 9.995 ? 2 : 1);
}

/** A token with what can't be seen in it. */
export function visible(token) {
  if (token === "") return "∅";
  return token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍").replaceAll(" ", "␣");
}

/** To two digits, without a trail of zeros. */
export function etaText(eta) {
  return String(Number(eta.toPrecision(2)));
}
