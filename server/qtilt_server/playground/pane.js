// One of the two answers: asks for it, draws it as it comes, and says what went wrong.

import { Answer } from "./answer.js";
import { element } from "./elements.js";
import { stream } from "./server.js";

const SPOKEN_EVERY_MS = 1500; // a screen reader would stumble over single tokens

export class Pane {
  answer = new Answer();
  #control = null;
  #frame = 0;
  #spoken = 0;
  #spokenAt = 0;

  /** draw(answer): puts its text into the pane, at most once a frame. */
  constructor(section, draw) {
    this.section = section;
    this.draw = draw;
  }

  get isRunning() {
    return this.#control !== null;
  }

  /** Asks, in place of what is under way here. Throws what the server refused, after showing it. */
  async ask(path, body, key) {
    this.stop();
    const control = (this.#control = new AbortController());
    const answer = (this.answer = new Answer());
    this.#begin();
    try {
      for await (const chunk of stream(path, body, key, control.signal)) {
        if (this.answer !== answer) return;
        answer.add(chunk);
        this.#drawSoon();
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      if (this.answer === answer) this.#showError(error);
      throw error;
    } finally {
      if (this.#control === control) this.#end();
    }
  }

  stop() {
    this.#control?.abort();
    if (this.#control) this.#end();
  }

  #begin() {
    this.section.querySelector(".error").hidden = true;
    this.section.querySelector(".spoken").replaceChildren();
    this.#spoken = 0;
    this.section.setAttribute("aria-busy", "true");
    this.draw(this.answer);
  }

  #end() {
    this.#control = null;
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.section.setAttribute("aria-busy", "false");
    this.draw(this.answer);
    this.#speak();
  }

  #drawSoon() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.draw(this.answer);
      if (performance.now() - this.#spokenAt > SPOKEN_EVERY_MS) this.#speak();
    });
  }

  #speak() {
    const news = this.answer.text.slice(this.#spoken);
    if (news !== "") this.section.querySelector(".spoken").append(news);
    this.#spoken = this.answer.text.length;
    this.#spokenAt = performance.now();
  }

  #showError(error) {
    const box = this.section.querySelector(".error");
    box.replaceChildren(
      element("b", { textContent: error.status || "no answer" }),
      element("strong", { textContent: error.field ?? "" }),
      element("span", { textContent: error.message }),
    );
    box.hidden = false;
  }
}
