// Server-sent events: from the bytes of a response to the JSON of each event.

const DONE = "[DONE]";

/** Yields the data of each event, parsed, until the stream ends. Comments (keep-alives) and [DONE] are skipped. */
export async function* events(body) {
  let rest = "";
  for await (const text of chunksOf(body.pipeThrough(new TextDecoderStream()))) {
    const whole = (rest + text).split(/\r?\n\r?\n/);
    rest = whole.pop();
    for (const event of whole) {
      const data = dataOf(event);
      if (data !== "" && data !== DONE) yield JSON.parse(data);
    }
  }
}

function dataOf(event) {
  const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice("data:".length).trimStart()).join("\n");
}

/** Not every browser can iterate a stream itself. */
async function* chunksOf(stream) {
  const reader = stream.getReader();
  try {
    for (let read = await reader.read(); !read.done; read = await reader.read()) yield read.value;
  } finally {
    reader.cancel().catch(() => {}); // of a stream that was aborted there is nothing left to cancel
  }
}
