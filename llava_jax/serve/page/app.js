// The chat page. Everything it knows stands in the state of App; the server keeps nothing.
import { h, render } from "./vendor/preact.js";
import { useEffect, useMemo, useRef, useState } from "./vendor/hooks.js";
import htm from "./vendor/htm.js";
import { answer, modelName, readImage } from "./client.js";
import { markdown } from "./markdown.js";

const html = htm.bind(h);
const EXAMPLES = [
  { image: "page/examples/1.png", text: "What colour is the circle?" },
  { image: "page/examples/2.png", text: "Where is the blue square?" },
  { image: "page/examples/3.png", text: "How many objects are there?" },
];
const DEFAULTS = { system: "", max_tokens: "512", temperature: "0", top_p: "1", seed: "" };
const SETTINGS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.1 }, "0: the likeliest answer"],
  ["top_p", "Top p", { min: 0.05, max: 1, step: 0.05 }, "draws from this share"],
  ["max_tokens", "Longest answer", { min: 1, step: 1 }, "in tokens"],
  ["seed", "Seed", { min: 0, step: 1 }, "repeats a drawn answer"],
];

const STOPPED = "Stopped.";
const NO_KEY = "This server asks for an API key", WRONG_KEY = "The server does not know this key";

let lastId = 0;
const message = (role, text, images = []) => ({ id: ++lastId, role, text, images, note: "", error: "" });

// What the server is asked: an answer that failed is left out with its question.
function request(model, messages, settings) {
  const shown = messages.filter((one, i) => !one.error && !(one.role === "user" && messages[i + 1]?.error));
  const content = (one) => one.images.length
    ? [...one.images.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text: one.text }]
    : one.text;
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  const numbers = SETTINGS.filter(([name]) => settings[name] !== "").map(([name]) => [name, Number(settings[name])]);
  return {
    model, stream: true, ...Object.fromEntries(numbers),
    messages: [...system, ...shown.map((one) => ({ role: one.role, content: content(one) }))],
  };
}

function useTheme() {
  const [theme, setTheme] = useState(localStorage.getItem("theme") ?? "");
  useEffect(() => {
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("theme", theme);
  }, [theme]);
  return [theme, setTheme];
}

function App() {
  const [model, setModel] = useState("");
  const [trouble, setTrouble] = useState("");
  const [locked, setLocked] = useState("");  // or what the dialog says when it asks for the key
  const [messages, setMessages] = useState([]);
  const [settings, setSettings] = useState(DEFAULTS);
  const [theme, setTheme] = useTheme();
  const [draft, setDraft] = useState({ text: "", images: [] });
  const [dragging, setDragging] = useState(false);
  const [spoken, setSpoken] = useState("");
  const running = useRef(null);
  const [busy, setBusy] = useState(false);
  const input = useRef(null);

  const connect = () => modelName().then((name) => { setModel(name); setLocked(""); setTrouble(""); })
    .catch((error) => error.status === 401 ? setLocked(sessionStorage.getItem("key") ? WRONG_KEY : NO_KEY) : setTrouble(error.message));
  useEffect(() => { connect(); }, []);
  useEffect(() => { if (model) document.title = `${model} – llava_jax`; }, [model]);
  useEffect(() => {
    const escape = (event) => event.key === "Escape" && running.current?.abort();
    addEventListener("keydown", escape);
    return () => removeEventListener("keydown", escape);
  }, []);
  const count = messages.length;
  const follow = (near = 120) => {  // unless the reader has scrolled up
    const page = document.scrollingElement;
    if (page.scrollHeight - page.scrollTop - page.clientHeight < near) page.scrollTop = page.scrollHeight;
  };
  useEffect(() => follow(Infinity), [count]);
  useEffect(() => follow(), [busy]);

  async function run(conversation) {
    const reply = message("assistant", "");
    const change = (more) => setMessages((all) => all.map((one) => (one.id === reply.id ? { ...one, ...more(one) } : one)));
    setMessages([...conversation, reply]);
    setBusy(true);
    setSpoken("");
    running.current = new AbortController();
    let text = "";
    try {
      const reason = await answer(request(model, conversation, settings), (more) => {
        text += more;
        change(() => ({ text }));
        follow();
      }, running.current.signal);
      if (reason === "length") change(() => ({ note: "ended at the longest answer" }));
      if (!text) change(() => ({ error: "The model gave no answer." }));
      setSpoken(text);
    } catch (error) {
      if (error.status === 401) setLocked(WRONG_KEY);
      if (error.name === "AbortError") change(() => (text ? { note: "stopped" } : { error: STOPPED }));
      else change(() => ({ error: error.message }));
      setSpoken(error.name === "AbortError" ? STOPPED : error.message);
    }
    running.current = null;
    setBusy(false);
  }

  async function addImages(files) {
    for (const file of files) {
      try {
        const url = await readImage(file);
        setDraft((now) => ({ ...now, images: [...now.images, url] }));
        setTrouble("");
      } catch (error) {
        setTrouble(error.message);
      }
    }
    input.current?.focus();
  }

  function send() {
    if (busy || !draft.text.trim() || !model) return;
    run([...messages, message("user", draft.text.trim(), draft.images)]);
    setDraft({ text: "", images: [] });
  }

  async function example({ image, text }) {
    const file = await (await fetch(image)).blob();
    run([message("user", text, [await readImage(file)])]);
  }

  const before = (id) => messages.slice(0, messages.findIndex((one) => one.id === id));
  const hasFiles = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file");
  const drop = {
    onDragOver: (event) => { if (hasFiles(event)) { event.preventDefault(); setDragging(true); } },
    onDragLeave: (event) => { if (!event.currentTarget.contains(event.relatedTarget)) setDragging(false); },
    onDrop: (event) => { event.preventDefault(); setDragging(false); addImages(event.dataTransfer.files); },
    onPaste: (event) => {
      const files = [...event.clipboardData.files];
      if (files.length) { event.preventDefault(); addImages(files); }
    },
  };

  return html`<div class="app ${dragging ? "dragging" : ""}" ...${drop}>
    <header>
      <h1>${model || "llava_jax"}</h1>
      <button class="quiet" disabled=${busy || !count} onClick=${() => { setMessages([]); input.current?.focus(); }}>New chat</button>
      <${Settings} settings=${settings} set=${setSettings} theme=${theme} setTheme=${setTheme} />
    </header>
    <main>
      ${!count && html`<${Welcome} ready=${model && !busy} run=${example} />`}
      <ol class="messages" aria-label="Conversation">
        ${messages.map((one, i) => html`<${Message} key=${one.id} one=${one} busy=${busy} last=${i === count - 1}
          again=${() => run(before(one.id))} edit=${(text) => run([...before(one.id), { ...message("user", text, one.images) }])} />`)}
      </ol>
    </main>
    <footer>
      ${trouble && html`<p class="error" role="alert">${trouble}</p>`}
      <${Composer} draft=${draft} setDraft=${setDraft} input=${input} busy=${busy} ready=${model} send=${send}
        stop=${() => running.current?.abort()} addImages=${addImages} />
    </footer>
    <div class="spoken" role="status" aria-live="polite">${spoken}</div>
    ${locked && html`<${Key} says=${locked} done=${connect} />`}
    ${dragging && html`<div class="drop" aria-hidden="true">Drop images here</div>`}
  </div>`;
}

function Welcome({ ready, run }) {
  return html`<section class="welcome">
    <h2>Ask about an image</h2>
    <p>Drop, paste or pick images, or begin with one of these.</p>
    <ul>${EXAMPLES.map((one) => html`<li><button disabled=${!ready} onClick=${() => run(one)}>
      <img src=${one.image} alt="" width="96" height="96" /><span>${one.text}</span></button></li>`)}</ul>
  </section>`;
}

function Message({ one, busy, last, again, edit }) {
  const [editing, setEditing] = useState(null);
  const elements = useMemo(() => markdown(one.text), [one.text]);
  const writing = busy && last && one.role === "assistant";
  const save = (event) => { event.preventDefault(); if (editing.trim()) { setEditing(null); edit(editing.trim()); } };
  const start = useRef(null);
  useEffect(() => { if (editing !== null) start.current?.focus(); }, [editing !== null]);
  return html`<li class=${one.role} aria-busy=${writing}>
    <span class="who">${one.role === "user" ? "You" : "Model"}</span>
    ${one.images.length > 0 && html`<div class="images">${one.images.map((url, i) =>
      html`<a href=${url} download=${`image-${i + 1}`} title="Download"><img src=${url} alt=${`Image ${i + 1} of this message`} /></a>`)}</div>`}
    ${editing !== null
      ? html`<form onSubmit=${save}><textarea ref=${start} aria-label="Your message" value=${editing} rows="3"
          onInput=${(event) => setEditing(event.target.value)}
          onKeyDown=${(event) => { if (event.key === "Escape") setEditing(null); else if (event.key === "Enter" && !event.shiftKey) save(event); }} />
          <div class="actions"><button class="main">Send</button>
          <button type="button" class="quiet" onClick=${() => setEditing(null)}>Cancel</button></div></form>`
      : one.role === "user" ? html`<p class="said">${one.text}</p>`
      : html`<div class="answer ${writing ? "writing" : ""}">${elements}</div>`}
    ${one.error && html`<p class=${one.error === STOPPED ? "note" : "error"}>${one.error}</p>`}
    ${one.note && html`<p class="note">${one.note}</p>`}
    ${!busy && editing === null && html`<div class="actions">
      ${one.role === "user" && html`<button class="quiet" onClick=${() => setEditing(one.text)}>Edit</button>`}
      ${one.role === "assistant" && html`<button class="quiet" onClick=${again}>Regenerate</button>`}
      ${one.text && navigator.clipboard && html`<button class="quiet" onClick=${() => navigator.clipboard.writeText(one.text)}>Copy</button>`}
    </div>`}
  </li>`;
}

function Composer({ draft, setDraft, input, busy, ready, send, stop, addImages }) {
  const picker = useRef(null);
  const remove = (index) => setDraft({ ...draft, images: draft.images.filter((_, i) => i !== index) });
  const pick = (event) => { addImages([...event.target.files]); event.target.value = ""; };
  const key = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  };
  useEffect(() => {
    input.current.style.height = "auto";
    input.current.style.height = `${input.current.scrollHeight}px`;
  }, [draft.text]);
  return html`<form class="composer" onSubmit=${(event) => { event.preventDefault(); send(); }}>
    ${draft.images.length > 0 && html`<ul class="images" aria-label="Images to send">${draft.images.map((url, i) => html`<li>
      <img src=${url} alt=${`Image ${i + 1} to send`} />
      <button type="button" aria-label=${`Remove image ${i + 1}`} onClick=${() => remove(i)}>×</button></li>`)}</ul>`}
    <div class="line">
      <input ref=${picker} type="file" accept="image/*" multiple hidden onChange=${pick} />
      <button type="button" class="quiet" aria-label="Add images" title="Add images" onClick=${() => picker.current.click()}>
        <svg viewBox="0 0 24 24" aria-hidden="true"><rect x="3" y="4" width="18" height="16" rx="3" /><circle cx="9" cy="10" r="1.8" /><path d="m4 18 6-5 4 3 3-2 4 3" /></svg></button>
      <textarea ref=${input} rows="1" autofocus placeholder="Ask about the image" aria-label="Message" value=${draft.text}
        onInput=${(event) => setDraft({ ...draft, text: event.target.value })} onKeyDown=${key} />
      ${busy ? html`<button type="button" class="main" onClick=${stop}>Stop</button>`
        : html`<button class="main" disabled=${!ready || !draft.text.trim()}>Send</button>`}
    </div>
  </form>`;
}

function Settings({ settings, set, theme, setTheme }) {
  const change = (name) => (event) => set({ ...settings, [name]: event.target.value });
  return html`<details class="settings"><summary>Settings</summary><div>
    <label>System text<textarea rows="2" value=${settings.system} placeholder="that of the model" onInput=${change("system")} /></label>
    ${SETTINGS.map(([name, title, range, hint]) => html`<label>${title} <small>${hint}</small>
      <input type="number" inputmode="decimal" ...${range} value=${settings[name]} onInput=${change(name)} /></label>`)}
    <label>Appearance<select value=${theme} onChange=${(event) => setTheme(event.target.value)}>
      <option value="">as the system</option><option value="light">light</option><option value="dark">dark</option></select></label>
    <button type="button" class="quiet" onClick=${() => set(DEFAULTS)}>Defaults</button>
  </div></details>`;
}

function Key({ says, done }) {
  const dialog = useRef(null);
  useEffect(() => { dialog.current.showModal(); }, []);
  const save = (event) => {
    event.preventDefault();
    sessionStorage.setItem("key", new FormData(event.target).get("key").trim());
    done();
  };
  return html`<dialog ref=${dialog} aria-labelledby="key-title" onCancel=${(event) => event.preventDefault()}><form onSubmit=${save}>
    <h2 id="key-title" role="status">${says}</h2>
    <label>Key<input name="key" type="password" autocomplete="current-password" required /></label>
    <p>It is kept until this tab is closed.</p>
    <button class="main">Continue</button>
  </form></dialog>`;
}

render(h(App), document.body);
