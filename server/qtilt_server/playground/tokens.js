// The guided tokens: coloured by value, walked through with the arrow keys.

import { element } from "./elements.js";
import { number, visible } from "./formats.js";

/** Draws tokens into a list; `chosen(index)` is called as one is pointed at, tapped, or reached by keyboard. */
export class TokenList {
  #spans = [];
  #current = -1;

  constructor(list, chosen) {
    this.list = list;
    this.chosen = chosen;
    list.addEventListener("pointerover", (event) => this.#reach(event));
    list.addEventListener("focusin", (event) => this.#reach(event));
    list.addEventListener("click", (event) => this.#reach(event)?.scrollIntoView({ block: "nearest" }));
    list.addEventListener("keydown", (event) => this.#walk(event));
  }

  /** Adds what is new, corrects what has changed, and drops what another answer had. range: the returns at the two ends of the colours. */
  draw(answer, range) {
    const { pieces, left } = answer.pieces;
    while (this.#spans.length > answer.tokens.length) this.#spans.pop().remove();
    if (this.#current >= this.#spans.length) this.#current = -1;
    answer.tokens.forEach((token, index) => {
      const span = (this.#spans[index] ??= this.#add(index));
      const piece = pieces[index];
      span.textContent = piece ?? visible(token.token);
      span.classList.toggle("unsaid", piece === null);
      span.classList.toggle("breaks", piece !== null && piece.includes("\n"));
      span.setAttribute("aria-label", `${visible(token.token)}, value ${number(token.value)}`);
      colour(span, token.value, range);
    });
    this.#rest().textContent = left;
  }

  /** Shows the token as the one that is looked at. */
  choose(index) {
    const span = this.#spans[index];
    if (span === undefined) return;
    const before = this.#spans[this.#current];
    before?.setAttribute("aria-selected", "false");
    if (before) before.tabIndex = -1;
    this.#current = index;
    span.setAttribute("aria-selected", "true");
    span.tabIndex = 0;
  }

  #add(index) {
    const span = element("span", { className: "token", tabIndex: index === 0 ? 0 : -1 });
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    span.dataset.index = index;
    this.list.insertBefore(span, this.#rest());
    return span;
  }

  /** What no token accounts for stands last. */
  #rest() {
    return this.list.querySelector(".rest") ?? this.list.appendChild(element("span", { className: "rest" }));
  }

  #reach(event) {
    const span = event.target.closest(".token");
    if (span) this.chosen(Number(span.dataset.index));
    return span;
  }

  #walk(event) {
    const last = this.#spans.length - 1;
    const to = {
      ArrowRight: Math.min(this.#current + 1, last),
      ArrowLeft: Math.max(this.#current - 1, 0),
      ArrowDown: this.#inLine(1),
      ArrowUp: this.#inLine(-1),
      Home: 0,
      End: last,
    }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.#spans[to].focus();
  }

  /** The token above or below the current one, nearest to it. */
  #inLine(direction) {
    const boxes = this.#spans.map((span) => span.getClientRects()[0]); // the first: it may go on in the next line
    const here = boxes[this.#current];
    if (here === undefined) return 0;
    const isBeyond = ({ box }) => (box.bottom - here.bottom) * direction > here.height / 2;
    const beyond = boxes.map((box, index) => ({ box, index })).filter(isBeyond);
    if (beyond.length === 0) return this.#current;
    const line = direction > 0 ? beyond[0].box.bottom : beyond.at(-1).box.bottom;
    const inLine = beyond.filter(({ box }) => Math.abs(box.bottom - line) < here.height / 2);
    const distance = ({ box }) => Math.abs(box.left - here.left);
    return inLine.reduce((best, each) => (distance(each) < distance(best) ? each : best)).index;
  }
}

/**
 * Where a value lies between the two ends, for the style sheet: orange below the middle, blue above, the colours that
 * people with any colour vision can tell apart.
 */
function colour(span, value, [least, most]) {
  span.classList.toggle("scored", value !== null);
  if (value === null) return;
  const share = most > least ? Math.min(Math.max((value - least) / (most - least), 0), 1) : 0.5;
  span.classList.toggle("low", share < 0.5);
  span.style.setProperty("--distance", `${(200 * Math.abs(share - 0.5)).toFixed(1)}%`);
}
