// The document itself, as far as the browser can show it. What is shown has a type that we give it by its
// first bytes, never one that could be a page with scripts.

import {element} from "./dom.js";
import {size, texts} from "./texts.js";

async function kindOf(file) {
    const bytes = new Uint8Array(await file.slice(0, 1024).arrayBuffer());
    const head = String.fromCharCode(...bytes);
    if (head.includes("%PDF-")) return "application/pdf";
    if (head.startsWith("\x89PNG\r\n\x1a\n")) return "image/png";
    if (head.startsWith("\xff\xd8\xff")) return "image/jpeg";
    if (head.startsWith("RIFF") && head.slice(8, 12) === "WEBP") return "image/webp";
    if (head.slice(4, 8) === "ftyp") return "image/heic"; // Safari shows it
    return null;
}

function placeholder(file) {
    return element("div", {class: "placeholder"},
        element("p", {class: "placeholder-name"}, file.name),
        element("p", {class: "muted"}, size(file.size)),
        element("p", {}, texts.noPreview));
}

/** {node, release}: release() when it is shown no more. */
export function preview(file) {
    const frame = element("div", {class: "document-frame"});
    const node = element("section", {class: "document", "aria-label": texts.documentNamed(file.name)},
        element("h4", {}, texts.document), frame);
    let url = null;
    let isOver = false;
    const shown = (content) => frame.replaceChildren(content);
    kindOf(file).then((kind) => {
        if (isOver) return;
        if (kind === null) {
            shown(placeholder(file));
            return;
        }
        url = URL.createObjectURL(file.slice(0, file.size, kind));
        const link = element("a", {href: url, target: "_blank", rel: "noopener"}, texts.openDocument);
        if (kind === "application/pdf") {
            shown(navigator.pdfViewerEnabled ? element("iframe", {src: url, title: texts.documentNamed(file.name)}) : placeholder(file));
            node.append(element("p", {}, link));
        } else {
            const image = element("img", {src: url, alt: texts.documentNamed(file.name)});
            image.addEventListener("error", () => shown(placeholder(file)));
            image.addEventListener("load", () => node.append(element("p", {}, link)));
            shown(image);
        }
    }, () => shown(placeholder(file)));
    const release = () => {
        isOver = true;
        if (url) URL.revokeObjectURL(url);
    };
    return {node, release};
}
