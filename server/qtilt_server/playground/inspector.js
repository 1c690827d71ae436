// What is known of one token: its numbers, and its candidates with reference and guided probability.

import { by, element } from "./elements.js";
import { number, percent, probability, visible } from "./formats.js";

const panel = by("inspector");

export function show(token, index, count) {
  panel.classList.add("open");
  panel.querySelector(".hint").hidden = true;
  const name = element("code", { textContent: visible(token.token) });
  by("inspector-title").replaceChildren(name, ` ${index + 1} of ${count}`);
  panel.querySelector("dl").replaceChildren(...facts(token));
  const table = panel.querySelector("table");
  table.hidden = token.candidates === null;
  table.tBodies[0].replaceChildren(...rows(token));
}

export function hide() {
  panel.classList.remove("open");
}

export function clear() {
  hide();
  panel.querySelector(".hint").hidden = false;
  panel.querySelector("table").hidden = true;
  panel.querySelector("dl").replaceChildren();
  by("inspector-title").textContent = "Token";
}

function facts(token) {
  if (token.kl === null) return fact("guidance", "none on this token");
  return [
    fact("probability, %", `${percent(token.reference_logprob)} → ${percent(token.guided_logprob)}`),
    fact("value, E[Z]", token.value === null ? "not scored" : number(token.value, 3)),
    fact("offset, nats", number(token.offset, 3)),
    fact("KL of the step, nats", number(token.kl, 4)),
    fact("entropy, nats", number(token.entropy, 2)),
    fact("token id", String(token.token_id)),
  ].flat();
}

function fact(name, value) {
  return [element("dt", { textContent: name }), element("dd", { textContent: value })];
}

function rows(token) {
  if (token.candidates === null) return [];
  const { token_ids, tokens, reference_logprobs, guided_logprobs, values } = token.candidates;
  const candidates = token_ids.map((id, k) =>
    ({ id, text: tokens[k], reference: reference_logprobs[k], guided: guided_logprobs[k], value: values[k] }));
  if (!token_ids.includes(token.token_id)) {
    const { token_id: id, token: text, reference_logprob: reference, guided_logprob: guided } = token;
    candidates.push({ id, text, reference, guided, value: null, isOutside: true });
  }
  const longest = probability(Math.max(...candidates.flatMap(({ reference, guided }) => [reference, guided])));
  return candidates.map((candidate) => row(candidate, candidate.id === token.token_id, longest));
}

function row({ text, reference, guided, value, isOutside = false }, isDrawn, longest) {
  const name = element("th", { scope: "row", title: visible(text) }, element("code", { textContent: visible(text) }));
  const pair = [bar("reference", reference, longest), bar("guided", guided, longest)];
  const bars = element("td", { className: "bars" }, ...pair);
  const numbers = [percent(reference), percent(guided), number(value)];
  const cells = numbers.map((textContent) => element("td", { textContent }));
  const made = element("tr", { className: isOutside ? "outside" : "" }, name, bars, ...cells);
  if (isDrawn) made.setAttribute("aria-current", "true");
  return made;
}

function bar(kind, logprob, longest) {
  const made = element("span", { className: `bar ${kind}` });
  made.style.setProperty("--share", `${((100 * probability(logprob)) / longest).toFixed(1)}%`);
  return made;
}
