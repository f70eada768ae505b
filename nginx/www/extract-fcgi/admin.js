// GET /admin/…: pages of rows, and whole tables as CSV.

import {dashboardTexts as texts} from "./texts.js";

const CSV_ROWS = 1000; // of a page; the most that there are

/** What a refusal says: its status, detail and request_id. */
export class Refusal extends Error {
    constructor(status, detail, requestId) {
        super(detail);
        Object.assign(this, {status, requestId});
    }
}

async function ask(path, parameters, key, accept) {
    const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== null && value !== ""));
    let answer;
    try {
        answer = await fetch(`/admin/${path}?${query}`, {headers: {Authorization: `Bearer ${key}`, Accept: accept}, cache: "no-store"});
    } catch {
        throw new Refusal(0, texts.noAnswer, null);
    }
    if (answer.ok) return answer;
    const problem = await answer.json().catch(() => null);
    throw new Refusal(answer.status, problem?.detail ?? texts.notUnderstood(answer.status),
        problem?.request_id ?? answer.headers.get("X-Request-ID"));
}

/** {rows, next}: next is the cursor of the page after it, or null. */
export async function page(path, parameters, key) {
    const body = await (await ask(path, parameters, key, "application/json")).json();
    return {rows: body.rows, next: body.next_cursor};
}

/** All pages as one table: the first line of those after the first says the columns again. */
export async function csv(path, parameters, key) {
    let [whole, cursor] = ["", null];
    do {
        const answer = await ask(path, {...parameters, limit: CSV_ROWS, cursor}, key, "text/csv");
        const text = await answer.text();
        whole += whole ? text.slice(text.indexOf("\n") + 1) : text;
        cursor = answer.headers.get("X-Next-Cursor");
    } while (cursor);
    return whole;
}
