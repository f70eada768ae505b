// The few things about elements that everything here needs. Text only ever becomes text, never HTML.

/** An element; of the properties, on… are listeners, the others attributes (false and null: none). */
export function element(name, properties = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
        if (value === false || value === null || value === undefined) continue;
        if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
        else node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return node;
}

/** Text for screen readers only. */
export const unseen = (text) => element("span", {class: "unseen"}, text);

/** A button whose visible words are short, and whose name says what it is about. */
export function button(words, name, onclick, properties = {}) {
    return element("button", {type: "button", "aria-label": name, onclick, ...properties}, words);
}

/** A file made of text goes to the user's downloads. */
export function download(name, type, text) {
    const url = URL.createObjectURL(new Blob([text], {type}));
    element("a", {href: url, download: name}).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
