// The server's routes, as this page asks them. Addresses are relative to the page's.

import { events } from "./sse.js";

/** What the server refused or what failed: `status` of HTTP (0: none), `field` of the request where it names one. */
export class ServerError extends Error {
  constructor(message, status, field) {
    super(message);
    this.status = status;
    this.field = field;
  }
}

export async function get(path, key) {
  return (await checked(ask(path, { headers: headersOf(key), cache: "no-store" }))).json();
}

/** The chunks of a streamed answer, as they come. */
export async function* stream(path, body, key, signal) {
  const response = await checked(post(path, { ...body, stream: true }, key, signal));
  try {
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw errorOf(chunk.error, response.status);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw new ServerError(`the answer broke off: ${error.message}`, 0, null);
  }
}

/** Whether the model has a chat template, as far as can be found out without a token being generated. */
export async function canChat(model, key) {
  const response = await post("tokenize", { model, messages: [{ role: "user", content: "?" }] }, key);
  return response.status !== 400;
}

function post(path, body, key, signal) {
  const headers = { ...headersOf(key), "Content-Type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

function headersOf(key) {
  return key === "" ? {} : { Authorization: `Bearer ${key}` };
}

async function ask(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(`the server can't be reached: ${error.message}`, 0, null);
  }
}

async function checked(asked) {
  const response = await asked;
  if (response.ok) return response;
  const text = await response.text();
  let error = text;
  try {
    error = JSON.parse(text).error ?? text;
  } catch {
    // Not the server's own, but a proxy's, say.
  }
  throw errorOf(error, response.status);
}

/** error: in OpenAI's shape, or a text. vLLM names some fields from the body on. */
function errorOf(error, status) {
  if (typeof error === "string") return new ServerError(error, status, null);
  const field = error.param ? error.param.replace(/^body\./, "") : null;
  return new ServerError(error.message, error.code ?? status, field);
}
