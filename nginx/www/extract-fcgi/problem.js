// What went wrong, and what can be done about it without paying twice.

import {texts} from "./texts.js";

/** A problem that the page has seen by itself. */
export function ownProblem(code, detail, {spent = false, retryable = false} = {}) {
    return {code, detail, spent, retryable, requestId: null, retryAfter: null, isOwn: true};
}

function parsed(text) {
    try {
        return JSON.parse(text);
    } catch {
        return null;
    }
}

/** Of upload.js's answer: {answer} where it is an invoice, else {problem}. */
export function judge(reply) {
    if (reply.broken && !reply.isSent) return {problem: ownProblem("not_sent", texts.notSent, {retryable: true})};
    if (reply.broken) {
        const detail = reply.broken === "timeout" ? texts.timeout : texts.noAnswer;
        return {problem: ownProblem("unknown", detail, {spent: true})};
    }
    const body = parsed(reply.text);
    if (reply.status === 200 && body?.status === "success") return {answer: body};
    if (typeof body?.code === "string" && typeof body.detail === "string") {
        const {code, detail} = body;
        return {
            problem: {
                code, detail,
                retryable: body.retryable === true,
                spent: body.spent === true,
                requestId: body.request_id ?? reply.requestId,
                retryAfter: reply.retryAfter,
                isOwn: false,
            },
        };
    }
    const problem = ownProblem("unknown", texts.notUnderstood(reply.status), {spent: true});
    return {problem: {...problem, requestId: reply.requestId, retryAfter: reply.retryAfter}};
}

const ANOTHER_FILE = new Set(["file_too_large", "unsupported_media_type", "invalid_file", "unreadable"]);
const OUTCOME_UNKNOWN = new Set(["unknown", "internal_error", "deadline_exceeded"]);

/**
 * What the user may do next: {action, isFresh, isAutomatic}.
 * - "again": the same request, the same Idempotency-Key. By itself where waiting alone helps.
 * - "ask": the same, where something was spent perhaps: the service then extracts, or says that it has (409).
 * - "anew": with a new key, so it will be paid for, perhaps once more.
 * - null: this file will not do.
 */
export function remedy({code, retryable, spent}) {
    const is = (action, isAutomatic = false) => ({action, isFresh: action === "anew", isAutomatic});
    if (ANOTHER_FILE.has(code)) return is(null);
    if (code === "already_processed") return is("anew");
    if (code === "request_in_progress") return is("ask");
    if (retryable) return spent ? is("anew") : is("again", code !== "not_sent");
    return is(spent && OUTCOME_UNKNOWN.has(code) ? "ask" : "again");
}

/** What to do about it, in words. */
export function advice({code, retryable, spent}) {
    if (spent && !retryable && OUTCOME_UNKNOWN.has(code)) return texts.advice.unknown;
    if (Object.hasOwn(texts.advice, code)) return texts.advice[code];
    return retryable ? texts.advice.retryable : texts.advice.other;
}
