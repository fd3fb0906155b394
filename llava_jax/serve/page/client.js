// The server as the page sees it: its model, a streamed answer, images made small enough to send.

const LONGEST_SIDE = 2048;

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached.", 0);
  }
  if (response.ok) return response;
  const reply = await response.json().catch(() => null);
  throw new Refused(reply?.error?.message ?? `The server answers ${response.status}.`, response.status);
}

export const modelName = async () => (await (await ask("v1/models")).json()).data[0].id;

// Calls `show` with each new text; returns how the answer ended.
export async function answer(body, show, signal) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  const reader = (await ask("v1/chat/completions", options)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", reason = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return reason;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(chunk.error.message, 500);
      const [choice] = chunk.choices;
      if (choice?.delta.content) show(choice.delta.content);
      reason = choice?.finish_reason || reason;
    }
  }
  throw new Refused("The connection ended before the answer did.", 0);
}

// A data: URL of an image file; a larger one than any vision tower reads is scaled down first.
export async function readImage(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Refused(`${file.name || "This"} is not an image that this browser reads.`, 0);
  }
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && ["image/png", "image/jpeg", "image/webp", "image/gif"].includes(file.type)) return dataUrl(file);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

const dataUrl = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(new Refused("The file cannot be read.", 0));
  reader.readAsDataURL(blob);
});
