// The page: its form, its list, and what is said about them.

import {EntryView, saveCsv, saveJson} from "./entry.js";
import {element} from "./dom.js";
import {keep, recall} from "./memory.js";
import {Queue} from "./queue.js";
import {language, size, texts} from "./texts.js";

const $ = (id) => document.getElementById(id);
const FIELDS = ["company", "user", "branch"];
const MAX_BYTES = 256; // of each text, as the service has it

const views = new Map(); // entry: EntryView

function say(text) {
    $("said").append(element("p", {}, text));
    while ($("said").childElementCount > 20) $("said").firstElementChild.remove();
}

// ---- words ----

document.documentElement.lang = language;
for (const node of document.querySelectorAll("[data-text]")) node.textContent = texts[node.dataset.text];

// ---- who asks ----

function showError(id, text) {
    $(`${id}-error`).textContent = text;
    $(`${id}-error`).hidden = !text;
    if (!$(id)) return;
    if (text) $(id).setAttribute("aria-invalid", "true");
    else $(id).removeAttribute("aria-invalid");
}

function mistake(name, value) {
    const label = texts[name];
    if (name === "key") return value && !/^[\x21-\x7e]+$/.test(value) ? texts.badKey : "";
    if (!value) return name === "branch" ? "" : texts.missing(label);
    if (/\p{Cc}/u.test(value)) return texts.controlCharacter(label);
    return new TextEncoder().encode(value).length > MAX_BYTES ? texts.tooLong(label) : "";
}

/** What is in the form; null, with the first mistake under the cursor, where it will not do. */
function whoAsks() {
    const names = [...FIELDS, "key"];
    const who = Object.fromEntries(names.map((name) => [name, $(name).value.trim()]));
    const wrong = names.filter((name) => {
        const text = mistake(name, who[name]);
        showError(name, text);
        return text;
    });
    if (wrong.length > 0) $(wrong[0]).focus();
    return wrong.length > 0 ? null : who;
}

function remember() {
    const who = $("remember").checked ? Object.fromEntries(FIELDS.map((name) => [name, $(name).value.trim()])) : null;
    const key = $("remember-key").checked ? $("key").value.trim() : null;
    if (!keep({who, key})) say(texts.cannotRemember);
}

function rememberAsBefore() {
    const {who, key} = recall();
    for (const name of FIELDS) $(name).value = who?.[name] ?? $(name).value;
    $("key").value = key ?? $("key").value;
    $("remember").checked = who !== null;
    $("remember-key").checked = key !== null;
}

function forget() {
    for (const name of [...FIELDS, "key"]) {
        $(name).value = "";
        showError(name, "");
    }
    $("remember").checked = $("remember-key").checked = false;
    remember();
    say(texts.forgotten);
}

// ---- the list ----

const queue = new Queue((entry, isNews) => {
    const view = views.get(entry);
    view?.update();
    if (!isNews) return;
    if (view) tell(entry, view);
    summarize();
});

function tell(entry, view) {
    const {name} = entry.file;
    const {problem, answer, state} = entry;
    if (state === "uploading") say(texts.said.uploading(name));
    if (state === "waiting") say(texts.said.waiting(name));
    if (state === "delayed") say(texts.said.delayed(name, problem.detail, queue.secondsLeft(entry)));
    if (state === "failed") say(texts.said.failed(name, problem.detail));
    if (state === "stopped") say(texts.said.stopped(name));
    if (state === "done") {
        say(texts.said.done(name, answer.warnings?.length ?? 0));
        if (![...views.values()].some(({isShown}) => isShown)) view.show(true);
    }
}

const finished = () => queue.entries.filter(({answer}) => answer).map(({file, text}) => ({file: file.name, text}));

function summarize() {
    const count = (...states) => queue.entries.filter(({state}) => states.includes(state)).length;
    const ready = count("ready");
    $("start").textContent = texts.start(ready);
    $("queue").hidden = queue.entries.length === 0;
    $("all").hidden = finished().length < 2;
    $("summary").textContent = texts.summary({
        ready, active: count("queued", "uploading", "waiting", "delayed"), done: count("done"), failed: count("failed", "stopped"),
    });
}

const actions = {
    cancel: (entry) => queue.cancel(entry),
    retry: (entry) => {
        const who = whoAsks();
        if (who) queue.retry(entry, who);
    },
    remove: (entry) => {
        const all = [...views.keys()];
        const next = all[all.indexOf(entry) + 1] ?? all[all.indexOf(entry) - 1];
        const view = views.get(entry);
        views.delete(entry);
        queue.remove(entry);
        view.release();
        view.node.remove();
        say(texts.said.removed(entry.file.name));
        if (next) views.get(next).focus();
        else $("choose").focus();
        summarize();
    },
    seconds: (entry) => queue.secondsLeft(entry),
    since: (entry) => queue.secondsSince(entry),
    say,
};

function add(files) {
    const fresh = [];
    for (const file of files) {
        const entry = queue.add(file);
        if (!entry) {
            say(texts.twice(file.name));
            showError("files", texts.twice(file.name));
            continue;
        }
        const view = new EntryView(entry, actions);
        views.set(entry, view);
        $("entries").append(view.node);
        if (entry.problem) tell(entry, view);
        fresh.push(file);
    }
    if (fresh.length > 0) {
        if (fresh.length === [...files].length) showError("files", "");
        say(fresh.length === 1 ? texts.added(fresh[0].name) : texts.addedMany(fresh.length));
    }
    summarize();
}

// ---- choosing, dropping, pasting ----

for (const [opener, input] of [["choose", "file"], ["photograph", "camera"]]) {
    $(opener).addEventListener("click", () => $(input).click());
    $(input).addEventListener("change", () => {
        add($(input).files);
        $(input).value = ""; // the same file may be chosen again after it was removed
    });
}

const bringsFiles = (event) => event.dataTransfer?.types.includes("Files");
let depth = 0; // dragenter and dragleave come for each element

for (const [name, change] of [["dragenter", 1], ["dragleave", -1]]) {
    addEventListener(name, (event) => {
        if (!bringsFiles(event)) return;
        event.preventDefault();
        depth += change;
        $("drop").classList.toggle("over", depth > 0);
    });
}
addEventListener("dragover", (event) => bringsFiles(event) && event.preventDefault());
addEventListener("drop", (event) => {
    if (!bringsFiles(event)) return;
    event.preventDefault();
    depth = 0;
    $("drop").classList.remove("over");
    const folders = new Set([...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.())
        .filter((dropped) => dropped?.isDirectory).map(({name}) => name));
    add([...event.dataTransfer.files].filter(({name}) => !folders.has(name)));
    for (const name of folders) {
        say(texts.folder(name));
        showError("files", texts.folder(name));
    }
});
addEventListener("paste", (event) => {
    const files = [...event.clipboardData?.files ?? []];
    if (files.length > 0) add(files);
});

// ---- the form ----

$("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const who = whoAsks();
    if (!who) return;
    if (queue.entries.some(({state}) => state === "ready")) {
        showError("files", "");
        queue.start(who);
        return;
    }
    if (queue.isBusy) return; // a second click
    showError("files", texts.noFiles);
    $("choose").focus();
});
for (const name of [...FIELDS, "key"]) {
    $(name).addEventListener("input", () => {
        if ($(name).hasAttribute("aria-invalid")) showError(name, mistake(name, $(name).value.trim()));
        if ($("remember").checked || $("remember-key").checked) remember();
    });
}
for (const id of ["remember", "remember-key"]) $(id).addEventListener("change", remember);
$("forget").addEventListener("click", forget);
$("all-json").addEventListener("click", () => saveJson(finished(), "invoices"));
$("all-csv").addEventListener("click", () => saveCsv(finished(), "invoices"));

addEventListener("beforeunload", (event) => {
    if (!queue.isBusy) return;
    event.preventDefault();
    event.returnValue = texts.leaving; // browsers say their own words
});

// ---- to begin with ----

$("files-hint").textContent = texts.formats;
rememberAsBefore();
summarize();

try {
    const settings = await (await fetch("/extract-fcgi/settings.json")).json();
    if (Number.isSafeInteger(settings.upload_limit)) {
        queue.limit = {bytes: settings.upload_limit, words: settings.upload_limit_text};
        $("files-hint").textContent = `${texts.formats} ${texts.limit(size(settings.upload_limit))}`;
    }
} catch {
    // Without it the service says what is too large.
}
document.documentElement.dataset.ready = "yes";
