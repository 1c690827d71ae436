// The page: what happens when something is typed, sent, moved or pointed at.

import { Curve } from "./curves.js";
import { by } from "./elements.js";
import { etaText, number } from "./formats.js";
import * as inspector from "./inspector.js";
import { Pane } from "./pane.js";
import { canChat, get } from "./server.js";
import * as settings from "./settings.js";
import { TokenList } from "./tokens.js";

let status = null; // what GET /v1/guidance said
let range = [0, 1]; // the returns that the guided answer's value model knows
let sent = null; // what was asked last
let before = { values: [], kl: [] }; // of the guided answer before, for the curves
let current = -1; // the token that is looked at

const tokens = new TokenList(by("guided").querySelector(".text"), (index) => look(index));
const valueCurve = new Curve(by("value-curve"), "value of each token", (index) => look(index));
const klCurve = new Curve(by("kl-curve"), "KL so far in nats", (index) => look(index));
const reference = new Pane(by("reference"), drawReference);
const guided = new Pane(by("guided"), drawGuided);

function drawReference(answer) {
  by("reference").querySelector(".text").textContent = answer.text;
  by("reference").querySelector(".sum").textContent = answer.usage ? `${answer.usage.completion_tokens} tokens` : "";
  showButtons();
}

function drawGuided(answer) {
  const shown = shownRange(answer);
  tokens.draw(answer, shown);
  [by("least").textContent, by("most").textContent] = shown.map((value) => number(value));
  const { guidance, total } = answer;
  by("guided").querySelector(".applied").textContent = guidance ? applied(guidance) : "steered, token by token";
  by("guided").querySelector(".sum").textContent = total
    ? `${answer.tokens.length} tokens, KL ${number(total.kl)} nats, candidates' mass ${number(total.mass)}`
    : "";
  drawCurves();
  showButtons();
}

function applied({ value_model, eta, method, tail, top_k }) {
  return `${value_model}, η ${etaText(eta)}, ${method}, tail ${tail}, top_k ${top_k}`;
}

function drawCurves() {
  const { answer } = guided;
  valueCurve.draw(answer.values, before.values, range, current);
  klCurve.draw(answer.runningKl, before.kl, [0, 0.01], current);
}

function shownRange(answer) {
  const values = answer.values.filter((value) => value !== null);
  return by("stretch").checked && values.length > 1 ? [Math.min(...values), Math.max(...values)] : range;
}

function look(index) {
  current = index;
  tokens.choose(index);
  inspector.show(guided.answer.tokens[index], index, guided.answer.tokens.length);
  drawCurves();
}

function showButtons() {
  const isRunning = reference.isRunning || guided.isRunning;
  by("stop").disabled = !isRunning;
  const eta = settings.read("eta");
  by("again").hidden = sent === null || eta === sent.guided.guidance.eta;
  by("again-eta").textContent = by("eta").value;
}

/** Both answers, streamed at the same time. */
async function send() {
  sent = settings.asked();
  settings.unmark();
  await Promise.all([askReference(), askGuided()]);
}

/** The guided answer to what was asked last, at the η of now: the reference's stays the same. */
async function again() {
  if (sent === null) return send();
  const guidance = { ...sent.guided.guidance, eta: settings.read("eta") };
  sent = { ...sent, guided: { ...sent.guided, guidance } };
  settings.unmark();
  await askGuided();
}

async function askReference() {
  await told(reference.ask(sent.path, sent.reference, settings.key()));
}

async function askGuided() {
  before = { values: guided.answer.values, kl: guided.answer.runningKl };
  range = settings.returnsOf(status);
  current = -1;
  inspector.clear();
  await told(guided.ask(sent.path, sent.guided, settings.key()));
}

/** Its pane shows the error; the form marks the field that it names. */
async function told(asking) {
  try {
    await asking;
  } catch (error) {
    settings.mark(error.field);
    if (error.status === 401) askForKey();
  } finally {
    showButtons();
  }
}

function stop() {
  reference.stop();
  guided.stop();
  showButtons();
}

/** Asks the server what there is to pick. */
async function lookUp() {
  try {
    const key = settings.key();
    const [models, guidance] = await Promise.all([get("v1/models", key), get("v1/guidance", key)]);
    const first = status === null;
    status = guidance;
    settings.fill(models, status, { first });
    placeEta();
    rangeOfChoice();
    by("access").open = false;
    const names = status.value_models.map(({ name, active }) => `${name}@${active}`);
    const steered = names.length ? `steered by ${names.join(" or ")}` : "no value model is loaded yet";
    say(`${by("model").value}, ${steered}`, "ready");
    if (first && !(await canChat(by("model").value, key))) by("kind").value = "completion";
  } catch (error) {
    say(error.status === 401 ? "this server wants its API key" : error.message, "failed");
    if (error.status === 401) askForKey();
  }
}

function say(text, state) {
  by("status").textContent = text;
  by("status").dataset.state = state;
}

function askForKey() {
  by("access").open = true;
  by("api-key").focus();
}

function rangeOfChoice() {
  if (guided.answer.tokens.length === 0) range = settings.returnsOf(status);
  drawGuided(guided.answer);
}

const placeEta = settings.joinEta(({ released }) => {
  showButtons();
  if (released && by("live").checked && sent !== null && !by("again").hidden) again();
});

settings.keepKey(lookUp);
by("value-model").addEventListener("change", () => {
  settings.fillVersions(status);
  settings.sampleAsRollouts(status);
  rangeOfChoice();
});
by("version").addEventListener("change", rangeOfChoice);
by("stretch").addEventListener("change", () => drawGuided(guided.answer));
by("stop").addEventListener("click", stop);
by("again").addEventListener("click", again);
by("close").addEventListener("click", inspector.hide);
by("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    send();
  } else if (event.key === "Escape") {
    stop();
    inspector.hide();
    by("access").open = false;
  }
});
addEventListener("focus", () => status && lookUp());
lookUp();
