// The files and what becomes of each: a few are under way at a time, the others wait for their turn.
//
//     ready → queued → uploading → waiting → done | failed | stopped
//                 ↑________ delayed ____|
//
// An entry has one Idempotency-Key for all its attempts; only who asks for it explicitly ("anew") gets
// another. An entry that waits for a retry keeps its place, so that a busy service is not asked more.

import {judge, ownProblem, remedy} from "./problem.js";
import {size, texts} from "./texts.js";
import {isReadable, send, uploadSize} from "./upload.js";

const AT_ONCE = 2;
const RETRIES = 3;
const DELAYS = [1, 2, 4]; // seconds, where the service does not say
const LONGEST = 60; // seconds that are waited without being told to

const UNDER_WAY = new Set(["uploading", "waiting", "delayed"]);

export class Queue {
    #limit = null; // {bytes, words}
    #onChange;
    #clock = null;
    entries = [];

    /** onChange(entry, isNews): something of the entry is different; isNews: its state. */
    constructor(onChange) {
        this.#onChange = onChange;
    }

    set limit(limit) {
        this.#limit = limit;
    }

    /** The new entry; null where the same file is there already. */
    add(file) {
        const isSame = ({file: other}) => other.name === file.name && other.size === file.size &&
            other.lastModified === file.lastModified;
        if (this.entries.some(isSame)) return null;
        const entry = {
            file, key: crypto.randomUUID(), state: "ready", sent: 0, total: file.size, since: 0, turn: 0,
            dueAt: 0, problem: null, remedy: null, answer: null, text: "", who: null, upload: null, timer: 0,
        };
        this.entries.push(entry);
        if (this.#limit && file.size > this.#limit.bytes) this.#refuse(entry, file.size);
        return entry;
    }

    remove(entry) {
        this.cancel(entry);
        this.entries = this.entries.filter((other) => other !== entry);
        this.#pump();
    }

    /** Sends all that are ready. */
    start(who) {
        for (const entry of this.entries.filter(({state}) => state === "ready")) this.#enqueue(entry, who);
        this.#pump();
    }

    /** Once more, as entry.remedy says; not before the service wants it. */
    retry(entry, who) {
        if (!entry.remedy?.action || this.secondsLeft(entry) > 0) return;
        if (entry.remedy.isFresh) entry.key = crypto.randomUUID();
        entry.turn = 0;
        this.#enqueue(entry, who);
        this.#pump();
    }

    cancel(entry) {
        clearTimeout(entry.timer);
        if (entry.state === "queued") this.#become(entry, "ready");
        else if (entry.state === "delayed") this.#become(entry, "failed");
        else if (entry.state === "uploading" || entry.state === "waiting") {
            const wasSent = entry.state === "waiting";
            entry.problem = wasSent ? ownProblem("unknown", texts.stoppedWaiting, {spent: true})
                : ownProblem("not_sent", texts.cancelled, {retryable: true});
            entry.remedy = remedy(entry.problem);
            entry.dueAt = 0;
            this.#become(entry, "stopped");
            entry.upload?.abort();
        }
        this.#pump();
    }

    /** Until it may be sent again. */
    secondsLeft(entry) {
        return Math.max(0, Math.ceil((entry.dueAt - Date.now()) / 1000));
    }

    secondsSince(entry) {
        return Math.max(0, Math.floor((Date.now() - entry.since) / 1000));
    }

    get isBusy() {
        return this.entries.some(({state}) => state === "queued" || UNDER_WAY.has(state));
    }

    #become(entry, state) {
        entry.state = state;
        entry.since = Date.now();
        this.#onChange(entry, true);
        this.#tick();
    }

    #enqueue(entry, who) {
        Object.assign(entry, {who, problem: null, remedy: null, sent: 0, dueAt: 0});
        this.#become(entry, "queued");
    }

    #pump() {
        while (this.entries.filter(({state}) => UNDER_WAY.has(state)).length < AT_ONCE) {
            const next = this.entries.find(({state}) => state === "queued");
            if (!next) return;
            this.#send(next);
        }
    }

    async #send(entry) {
        const isStill = (upload) => entry.upload === upload && entry.state !== "stopped";
        const mine = {abort: () => {}};
        entry.upload = mine;
        this.#become(entry, "uploading");
        const [total, readable] = await Promise.all([uploadSize(entry.file, entry.who), isReadable(entry.file)]);
        if (!isStill(mine)) return;
        if (!readable) {
            this.#fail(entry, ownProblem("unreadable", texts.unreadable));
            return;
        }
        if (this.#limit && total > this.#limit.bytes) {
            this.#refuse(entry, total);
            return;
        }
        entry.total = total;
        const upload = send(entry.file, entry.who, entry.key, {
            onProgress: (sent) => {
                if (!isStill(upload)) return;
                entry.sent = sent;
                this.#onChange(entry, false);
            },
            onSent: () => {
                if (!isStill(upload)) return;
                entry.sent = entry.total;
                this.#become(entry, "waiting");
            },
        });
        entry.upload = upload;
        const reply = await upload.answer;
        if (!isStill(upload)) return;
        const {answer, problem} = judge(reply);
        if (problem) {
            this.#fail(entry, problem);
            return;
        }
        Object.assign(entry, {answer, text: reply.text});
        this.#become(entry, "done");
        this.#pump();
    }

    #refuse(entry, bytes) {
        this.#fail(entry, ownProblem("file_too_large", texts.tooLarge(size(bytes), bytes, this.#limit.words)));
    }

    #fail(entry, problem) {
        entry.problem = problem;
        entry.remedy = remedy(problem);
        const mayTry = entry.remedy.isAutomatic && entry.turn < RETRIES;
        const seconds = problem.retryAfter ?? (mayTry ? DELAYS[entry.turn] : 0);
        const isAgain = mayTry && seconds <= LONGEST;
        entry.dueAt = seconds > 0 ? Date.now() + seconds * 1000 : 0;
        if (isAgain) {
            entry.turn += 1;
            entry.timer = setTimeout(() => {
                Object.assign(entry, {problem: null, remedy: null, sent: 0, dueAt: 0});
                this.#send(entry);
            }, seconds * 1000);
            this.#become(entry, "delayed");
        } else {
            this.#become(entry, "failed");
            this.#pump();
        }
    }

    /** Seconds that are shown go on while there are any; the browser may be late (a tab in the background). */
    #tick() {
        const counting = () => this.entries.filter(({state, dueAt}) => state === "waiting" || dueAt > 0);
        if (this.#clock || counting().length === 0) return;
        this.#clock = setInterval(() => {
            for (const entry of counting()) {
                if (this.secondsLeft(entry) === 0) entry.dueAt = 0;
                this.#onChange(entry, false);
            }
            if (counting().length > 0) return;
            clearInterval(this.#clock);
            this.#clock = null;
        }, 1000);
    }
}

export const turns = RETRIES;
