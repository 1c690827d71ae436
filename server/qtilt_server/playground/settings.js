// The form: what may be picked, filled from the server, and the request bodies it stands for.

import { by, element } from "./elements.js";
import { etaText } from "./formats.js";

const KEY = "qtilt-api-key";
const SEEDS = 2 ** 31;
const OURS = "qtilt"; // owner of the models that are a reference with its guidance: here one picks the two apart

/** Fills the pickers, and the fields the first time. What was picked before stays picked if it is still there. */
export function fill(models, status, { first }) {
  const references = models.data.filter((model) => model.owned_by !== OURS);
  options(by("model"), references.map(({ id }) => [id, id]));
  options(by("value-model"), status.value_models.map(({ name }) => [name, name]), status.defaults.value_model);
  fillVersions(status);
  if (!first) return;
  by("eta").value = etaText(status.defaults.eta);
  by("top-k").value = status.defaults.top_k;
  by("method").value = status.defaults.method;
  by("tail").value = status.defaults.tail;
  sampleAsRollouts(status);
}

/** A value model estimates the reward of roll-outs sampled in one way: the fields say that one. */
export function sampleAsRollouts(status) {
  const { temperature = 1, top_p = 1, top_k = 0 } = chosen(status)?.rollouts ?? {};
  by("temperature").value = temperature;
  by("top-p").value = top_p < 1 ? top_p : "";
  by("sampling-top-k").value = top_k > 0 ? top_k : "";
}

export function fillVersions(status) {
  const { versions } = status.value_models.find(({ name }) => name === by("value-model").value) ?? { versions: [] };
  const said = ({ version, type, path, state }) =>
    `${version}, ${type}-type, ${path.split("/").at(-1)}${state === "draining" ? ", on its way out" : ""}`;
  const named = versions.map((each) => [String(each.version), said(each)]);
  const active = versions.find(({ state }) => state === "active");
  if (by("version").dataset.of !== by("value-model").value) by("version").value = "";
  by("version").dataset.of = by("value-model").value;
  options(by("version"), [["", `the active one${active ? `, ${active.version}` : ""}`], ...named], "");
}

function options(select, pairs, preferred) {
  const before = select.value;
  select.replaceChildren(...pairs.map(([value, textContent]) => element("option", { value, textContent })));
  const has = (wanted) => pairs.some(([value]) => value === wanted);
  select.value = has(before) ? before : has(preferred) ? preferred : (pairs[0]?.[0] ?? "");
}

/** What is asked now: the route, the reference's body and the guided one, with the same seed. */
export function asked() {
  const isChat = by("kind").value === "chat";
  const prompt = by("prompt").value;
  const reference = {
    model: by("model").value,
    ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    ...given({
      max_tokens: read("max-tokens"),
      temperature: read("temperature"),
      top_p: read("top-p"),
      top_k: read("sampling-top-k"),
    }),
    seed: read("seed") ?? Math.floor(Math.random() * SEEDS),
    stream_options: { include_usage: true },
  };
  const version = by("version").value;
  const guidance = given({
    value_model: by("value-model").value === "" ? undefined : by("value-model").value + (version && `@${version}`),
    eta: read("eta"),
    top_k: read("top-k"),
    method: by("method").value,
    tail: by("tail").value,
    details: true,
  });
  return { path: isChat ? "v1/chat/completions" : "v1/completions", reference, guided: { ...reference, guidance } };
}

/** The number in a field, undefined if it's empty; what is no number goes to the server as it is, which says so. */
export function read(id) {
  const text = by(id).value.trim();
  if (text === "") return undefined;
  const number = Number(text.replace(",", "."));
  return Number.isFinite(number) ? number : text;
}

function given(fields) {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined));
}

/** The lowest and the highest return of the version picked. */
export function returnsOf(status) {
  const { low = 0, high = 1 } = chosen(status)?.distribution ?? {};
  return [low, high];
}

/** What GET /v1/guidance says of the version picked. */
function chosen(status) {
  const model = status?.value_models.find(({ name }) => name === by("value-model").value);
  const wanted = by("version").value === "" ? model?.active : Number(by("version").value);
  return model?.versions.find(({ version }) => version === wanted);
}

/** Slider and field of η tell the same; the field takes more than the slider reaches. */
export function joinEta(changed) {
  const [field, slider] = [by("eta"), by("eta-slider")];
  const place = () => {
    const eta = read("eta");
    if (eta > 0) slider.value = Math.log10(eta);
    slider.setAttribute("aria-valuetext", `η ${field.value}`);
  };
  field.addEventListener("input", () => (place(), changed({ released: false })));
  field.addEventListener("change", () => changed({ released: true }));
  slider.addEventListener("input", () => {
    field.value = etaText(10 ** Number(slider.value));
    slider.setAttribute("aria-valuetext", `η ${field.value}`);
    changed({ released: false });
  });
  slider.addEventListener("change", () => changed({ released: true }));
  return place;
}

/** The key of this tab. Never in an address, never in the browser's storage beyond the tab. */
export function keepKey(changed) {
  by("api-key").value = sessionStorage.getItem(KEY) ?? "";
  by("api-key").addEventListener("change", () => {
    sessionStorage.setItem(KEY, by("api-key").value);
    changed();
  });
}

export const key = () => by("api-key").value.trim();

export function unmark() {
  for (const marked of document.querySelectorAll("[aria-invalid]")) marked.removeAttribute("aria-invalid");
}

/** Marks the field that an error names. */
export function mark(field) {
  const meant = document.querySelector(`[data-field="${CSS.escape(field ?? "")}"]`);
  meant?.setAttribute("aria-invalid", "true");
  if (meant?.closest("details")) meant.closest("details").open = true;
}
