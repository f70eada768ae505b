// One file of the list, as it is seen.

import {button, download, element} from "./dom.js";
import {exactData, toCsv, toJson} from "./export.js";
import {renderInvoice} from "./invoice.js";
import {preview} from "./preview.js";
import {advice} from "./problem.js";
import {turns} from "./queue.js";
import {number, size, texts} from "./texts.js";

let made = 0;

const baseName = (name) => name.replace(/\.[^.]*$/, "") || name;

export const saveJson = (results, name) => download(`${name}.json`, "application/json", toJson(results));
/** With the mark that makes spreadsheets read UTF-8. */
export const saveCsv = (results, name) => download(`${name}.csv`, "text/csv;charset=utf-8", `\ufeff${toCsv(results)}`);

export class EntryView {
    #entry;
    #actions;
    #preview = null;
    #nodes;
    #buttons;
    #shown = null; // the state that #nodes show

    /** actions: {cancel, retry, remove, seconds, since, say} */
    constructor(entry, actions) {
        this.#entry = entry;
        this.#actions = actions;
        const {name} = entry.file;
        const id = `entry-${++made}`;
        const title = element("h3", {id, class: "file-name", tabindex: "-1"}, name);
        const nodes = {
            title,
            state: element("span", {class: "state"}),
            progress: element("progress", {max: "1", "aria-labelledby": id, hidden: true}),
            detail: element("p", {class: "detail", hidden: true}),
            problem: element("div", {class: "note problem", hidden: true}),
            result: element("div", {class: "result", id: `${id}-result`, hidden: true}),
        };
        this.#nodes = nodes;
        this.#buttons = {
            show: button(texts.show, texts.named(texts.show, name), () => this.show(nodes.result.hidden),
                {"aria-expanded": "false", "aria-controls": `${id}-result`}),
            cancel: button(texts.cancel, texts.named(texts.cancel, name), () => actions.cancel(entry)),
            retry: button(texts.again, texts.named(texts.again, name), () => this.#retry()),
            remove: button(texts.remove, texts.named(texts.remove, name), () => actions.remove(entry), {class: "quiet"}),
        };
        const {show, cancel, retry, remove} = this.#buttons;
        this.node = element("li", {class: "entry card"},
            element("div", {class: "entry-head"},
                element("div", {class: "entry-title"}, title, element("p", {class: "muted"}, size(entry.file.size))),
                nodes.state,
                element("div", {class: "buttons"}, show, cancel, retry, remove)),
            nodes.progress, nodes.detail, nodes.problem, nodes.result);
        this.update();
    }

    focus() {
        this.#nodes.title.focus();
    }

    get isShown() {
        return !this.#nodes.result.hidden;
    }

    show(isShown) {
        const {show} = this.#buttons;
        const {name} = this.#entry.file;
        this.#nodes.result.hidden = !isShown;
        show.textContent = isShown ? texts.hide : texts.show;
        show.setAttribute("aria-label", texts.named(show.textContent, name));
        show.setAttribute("aria-expanded", String(isShown));
        if (isShown && !this.#preview) {
            this.#preview = preview(this.#entry.file);
            this.#nodes.result.append(element("div", {class: "side-by-side"}, this.#invoice(), this.#preview.node));
        }
    }

    release() {
        this.#preview?.release();
    }

    #retry() {
        const {seconds, retry, say} = this.#actions;
        const left = seconds(this.#entry);
        if (left > 0) say(texts.waitFor(left));
        else retry(this.#entry);
    }

    #invoice() {
        const {answer, text, file} = this.#entry;
        const results = [{file: file.name, text}];
        const {say} = this.#actions;
        const copy = (what) => () => navigator.clipboard.writeText(what(results))
            .then(() => say(texts.copied), () => say(texts.cannotCopy));
        const tool = (words, onclick) => button(words, texts.named(words, file.name), onclick);
        return element("section", {class: "read", "aria-label": texts.result(file.name)},
            element("div", {class: "buttons tools"},
                tool(texts.copyJson, copy(toJson)), tool(texts.copyCsv, copy(toCsv)),
                tool(texts.downloadJson, () => saveJson(results, baseName(file.name))),
                tool(texts.downloadCsv, () => saveCsv(results, baseName(file.name)))),
            renderInvoice(exactData(text), answer.warnings),
            element("p", {class: "hint foot"},
                texts.used({model: answer.model, tokens: number(answer.usage?.total_tokens ?? 0), attempts: answer.attempts}),
                " · ", this.#requestId(answer.request_id)));
    }

    #requestId(id) {
        const copy = () => navigator.clipboard.writeText(id)
            .then(() => this.#actions.say(texts.copied), () => this.#actions.say(texts.cannotCopy));
        return element("span", {class: "request-id"}, `${texts.requestId} `, element("code", {}, id), " ",
            button("⧉", texts.copyRequestId, copy, {class: "icon", title: texts.copyRequestId}));
    }

    #problem() {
        const {problem, state} = this.#entry;
        if (state === "stopped") return [element("p", {}, problem.detail)];
        return [
            element("p", {class: "problem-detail"}, problem.detail),
            state === "failed" && element("p", {}, advice(problem), " ",
                problem.code === "unknown" || problem.isOwn ? null : problem.spent ? texts.spent : texts.nothingSpent),
            problem.requestId && element("p", {class: "hint"}, this.#requestId(problem.requestId)),
        ].filter(Boolean);
    }

    /** After its state has changed, or a number in it. */
    update() {
        const {state, problem, remedy, answer, turn, sent, total, file} = this.#entry;
        const {progress, detail, result} = this.#nodes;
        const {show, cancel, retry, remove} = this.#buttons;
        const left = this.#actions.seconds(this.#entry);
        const isNew = this.#shown !== state;

        if (state === "uploading") progress.value = total > 0 ? sent / total : 0;
        detail.textContent = {
            uploading: texts.uploaded(size(sent), size(total)),
            waiting: texts.reading(this.#actions.since(this.#entry)),
            delayed: texts.againIn(left, turn, turns),
            failed: left > 0 ? texts.waitFor(left) : "",
        }[state] ?? "";
        detail.hidden = detail.textContent === "";
        if (remedy?.action) {
            retry.textContent = texts[remedy.action];
            retry.setAttribute("aria-label", texts.named(texts[remedy.action], file.name));
            if (left > 0) retry.setAttribute("aria-disabled", "true");
            else retry.removeAttribute("aria-disabled");
        }
        if (!isNew) return;

        this.#shown = state;
        this.node.dataset.state = state;
        this.#nodes.state.textContent = texts.states[state];
        progress.hidden = state !== "uploading" && state !== "waiting";
        if (state === "waiting") progress.removeAttribute("value");
        this.#nodes.problem.hidden = !problem;
        this.#nodes.problem.replaceChildren(...(problem ? this.#problem() : []));
        const isUnderWay = ["queued", "uploading", "waiting", "delayed"].includes(state);
        const hadFocus = this.node.contains(document.activeElement);
        show.hidden = answer === null;
        cancel.hidden = !isUnderWay;
        cancel.textContent = state === "waiting" ? texts.stop : texts.cancel;
        cancel.setAttribute("aria-label", texts.named(cancel.textContent, file.name));
        retry.hidden = !(state === "failed" || state === "stopped") || !remedy?.action;
        remove.hidden = isUnderWay;
        if (answer === null) result.hidden = true;
        const isGone = document.activeElement === document.body || document.activeElement?.hidden;
        if (hadFocus && isGone) ([show, retry, cancel].find((each) => !each.hidden) ?? this.#nodes.title).focus();
    }
}
