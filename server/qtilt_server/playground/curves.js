// A curve over the tokens of an answer, as inline SVG; the answer before stays behind it, dotted.

import { shape } from "./elements.js";
import { number } from "./formats.js";

const [WIDTH, HEIGHT] = [480, 150];
const EDGE = { left: 44, right: 10, top: 10, bottom: 22 };

export class Curve {
  #svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  #innerWidth = WIDTH - EDGE.left - EDGE.right;
  #count = 0; // tokens of this answer
  #span = 2; // places on the axis: those of the longer of the two answers

  /** chosen(index): called as a token is pointed at. */
  constructor(figure, name, chosen) {
    this.name = name;
    this.figure = figure;
    figure.append(this.#svg);
    const point = (event) => {
      const box = this.#svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * WIDTH;
      const index = Math.round(((x - EDGE.left) / this.#innerWidth) * (this.#span - 1));
      if (this.#count > 0) chosen(Math.min(Math.max(index, 0), this.#count - 1));
    };
    this.#svg.addEventListener("pointermove", point);
    this.#svg.addEventListener("pointerdown", point);
    this.draw([], [], [0, 1]);
  }

  /** series, before: a number a token, null for none. range: what the axis covers at least. */
  draw(series, before, range, current = -1) {
    const numbers = [...series, ...before].filter((value) => value !== null);
    const [least, most] = [Math.min(...numbers, range[0]), Math.max(...numbers, range[1])];
    this.figure.classList.toggle("compared", before.length > 0);
    this.#count = series.length;
    this.#span = Math.max(series.length, before.length, 2);
    const x = (index) => EDGE.left + (index / (this.#span - 1)) * this.#innerWidth;
    const y = (value) => EDGE.top + (1 - (value - least) / (most - least)) * (HEIGHT - EDGE.top - EDGE.bottom);
    this.#svg.replaceChildren(
      ...this.#axes(least, most, x, y),
      line("before", before, x, y),
      line("now", series, x, y),
      ...marked(series, current, x, y),
    );
    const known = series.filter((value) => value !== null);
    const ends = known.length && `from ${number(known[0])} to ${number(known.at(-1))}`;
    const told = ends ? `${series.length} tokens, ${ends}` : "nothing yet";
    this.#svg.setAttribute("aria-label", `${this.name}: ${told}`);
  }

  #axes(least, most, x, y) {
    const end = WIDTH - EDGE.right;
    const rule = (level) => shape("line", { class: "grid", x1: EDGE.left, x2: end, y1: y(level), y2: y(level) });
    const text = (x, y, said) => shape("text", { x, y, "text-anchor": "end" }, said);
    const levels = [least, (least + most) / 2, most];
    return [
      ...levels.map(rule),
      ...levels.map((level) => text(EDGE.left - 6, y(level) + 4, number(level))),
      shape("text", { x: x(0), y: HEIGHT - 5 }, "1"),
      text(end, HEIGHT - 5, this.#count > 1 ? `token ${this.#span}` : "token"),
    ];
  }
}

/** From number to number: where there is none the line goes on to the next. */
function line(name, series, x, y) {
  const point = (value, index) => (value === null ? null : `${x(index).toFixed(1)} ${y(value).toFixed(1)}`);
  const points = series.map(point);
  const path = points.filter((point) => point !== null).join("L");
  return shape("path", { class: name, d: `M${path || "0 0"}` });
}

function marked(series, index, x, y) {
  const value = series[index];
  if (value === undefined) return [];
  const rule = shape("line", { class: "mark", x1: x(index), x2: x(index), y1: EDGE.top, y2: HEIGHT - EDGE.bottom });
  return value === null ? [rule] : [rule, shape("circle", { class: "mark", cx: x(index), cy: y(value), r: 4 })];
}
