// One answer as it comes: its text, the details of its tokens, and which part of the text each token is.

const INCOMPLETE = "\uFFFD"; // a token that is some bytes of a character only
const NEAR = 8; // characters that may lie between one token and the next: what incomplete ones make together

export class Answer {
  text = "";
  tokens = []; // TokenDetails of the HTTP API
  usage = null; // how many tokens
  guidance = null; // what was applied, with every default filled in
  total = null; // what the server says of the whole choice
  finish = null; // why it ended; null: it runs, or was stopped

  add(chunk) {
    this.guidance = chunk.guidance ?? this.guidance;
    this.usage = chunk.usage ?? this.usage;
    for (const choice of chunk.choices) {
      this.text += choice.text ?? `${choice.delta.reasoning ?? ""}${choice.delta.content ?? ""}`;
      this.tokens.push(...(choice.guidance?.details ?? []));
      this.finish = choice.finish_reason ?? this.finish;
      if (choice.guidance && "kl" in choice.guidance) this.total = choice.guidance;
    }
  }

  get values() {
    return this.tokens.map((token) => token.value);
  }

  /** KL to the reference up to and with each token, nats. */
  get runningKl() {
    let sum = 0;
    return this.tokens.map((token) => (sum += token.kl ?? 0));
  }

  /**
   * The part of the text that each token is; null for one that is none, the end of the turn say. `left` is text that no
   * token accounts for. Alone a token may be another text than in its place: SentencePiece drops its space, and a
   * character may take several tokens. Details may come before the text they are of.
   */
  get pieces() {
    const pieces = [];
    let cursor = 0;
    let incomplete = null;
    for (const { token } of this.tokens) {
      const found = token.includes(INCOMPLETE) ? null : this.#find(token, cursor, incomplete !== null);
      if (found !== null) {
        const before = this.text.slice(cursor, found.at);
        if (incomplete !== null) pieces[incomplete] = before;
        pieces.push(incomplete === null ? before + found.text : found.text);
        [cursor, incomplete] = [found.at + found.text.length, null];
      } else {
        const mayCome = this.finish === null && cursor === this.text.length && !token.includes(INCOMPLETE);
        if (token.includes(INCOMPLETE)) incomplete = pieces.length;
        pieces.push(mayCome ? token : null);
      }
    }
    if (incomplete !== null && cursor < this.text.length) {
      pieces[incomplete] = this.text.slice(cursor);
      cursor = this.text.length;
    }
    return { pieces, left: this.text.slice(cursor) };
  }

  /** Where the token goes on from the cursor, as it is or without its space: after nothing but space, or near by. */
  #find(token, cursor, afterIncomplete) {
    for (const text of [token, token.trimStart()]) {
      const at = text === "" ? -1 : this.text.indexOf(text, cursor);
      const between = this.text.slice(cursor, at);
      if (at >= 0 && (between.trim() === "" || (afterIncomplete && between.length <= NEAR))) return { at, text };
    }
    return null;
  }
}
