// Markdown to elements. marked splits the text into tokens; every token becomes an element with text in it, and none
// becomes HTML: what a model writes cannot run, load or style anything.
import { h } from "./vendor/preact.js";
import { lexer } from "./vendor/marked.js";

const SAFE_LINK = /^(https?:|mailto:)/i;
const TAGS = { paragraph: "p", blockquote: "blockquote", strong: "strong", em: "em", del: "del", list_item: "li" };

export function markdown(text) {
  return lexer(text, { gfm: true }).map(element);
}

const inside = (token) => (token.tokens ? token.tokens.map(element) : unescaped(token.text ?? token.raw));

function element(token) {
  switch (token.type) {
    case "space": case "def": return null;
    case "hr": return h("hr");
    case "br": return h("br");
    case "heading": return h(`h${Math.min(token.depth + 2, 6)}`, null, inside(token));
    case "code": return h("pre", { tabIndex: 0 }, h("code", null, token.text));
    case "codespan": return h("code", null, token.text);
    case "list": return h(token.ordered ? "ol" : "ul", token.ordered ? { start: token.start || 1 } : null, token.items.map(element));
    case "checkbox": return token.checked ? "☑ " : "☐ ";
    case "table": return table(token);
    case "link": return SAFE_LINK.test(token.href)
      ? h("a", { href: token.href, target: "_blank", rel: "noopener noreferrer" }, inside(token)) : inside(token);
    case "image": return `[${token.text}]`;
    case "html": return token.raw;
    default: return TAGS[token.type] ? h(TAGS[token.type], null, inside(token)) : inside(token);
  }
}

function table(token) {
  const cell = (tag) => (one) => h(tag, null, one.tokens.map(element));
  return h("div", { class: "table", tabIndex: 0 }, h("table", null,
    h("thead", null, h("tr", null, token.header.map(cell("th")))),
    h("tbody", null, token.rows.map((row) => h("tr", null, row.map(cell("td")))))));
}

// marked escapes nothing in tokens, but leaves the entities that the text was written with.
const ENTITIES = { "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": "\u00a0", "&amp;": "&" };
const unescaped = (text) => text.replace(/&(?:lt|gt|quot|#39|nbsp|amp);/g, (entity) => ENTITIES[entity]);
