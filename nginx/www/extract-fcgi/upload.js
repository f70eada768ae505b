// One POST /extract, by XMLHttpRequest: fetch does not tell how much of an upload was sent.

const PATIENCE_MS = 180_000; // longer than the service's deadline (120 s) and nginx's patience (150 s)

function formOf(file, {company, user, branch}) {
    const form = new FormData();
    form.append("companyID", company);
    form.append("username", user);
    if (branch) form.append("branch", branch);
    form.append("file", file, file.name);
    return form;
}

/** Bytes of the whole request body: what the limit is about. */
export async function uploadSize(file, who) {
    const empty = new File([], file.name, {type: file.type});
    return (await new Response(formOf(empty, who)).arrayBuffer()).byteLength + file.size;
}

/** Can the file still be read? It may have been moved or changed since it was chosen. */
export async function isReadable(file) {
    try {
        await file.slice(0, 1).arrayBuffer();
        return true;
    } catch {
        return false;
    }
}

/**
 * Sends it. onProgress(sent, total) in bytes, onSent() when all of it is away.
 * answer: a promise, never rejected, of {status, text, requestId, retryAfter} (seconds or null), or of
 * {broken: "connection" | "timeout" | "abort", isSent} where no answer came.
 */
export function send(file, who, idempotencyKey, {onProgress, onSent}) {
    const xhr = new XMLHttpRequest();
    let isSent = false;
    const answer = new Promise((resolve) => {
        const broken = (why) => () => resolve({broken: why, isSent});
        xhr.open("POST", "/extract");
        if (who.key) xhr.setRequestHeader("Authorization", `Bearer ${who.key}`);
        xhr.setRequestHeader("Idempotency-Key", idempotencyKey);
        xhr.timeout = PATIENCE_MS;
        xhr.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded, event.total);
        xhr.upload.onload = () => {
            isSent = true;
            onSent();
        };
        xhr.onload = () => {
            const seconds = Number.parseInt(xhr.getResponseHeader("Retry-After") ?? "", 10);
            resolve({
                status: xhr.status,
                text: xhr.responseText,
                requestId: xhr.getResponseHeader("X-Request-ID"),
                retryAfter: Number.isNaN(seconds) ? null : seconds,
            });
        };
        xhr.onerror = broken("connection");
        xhr.ontimeout = broken("timeout");
        xhr.onabort = broken("abort");
        xhr.send(formOf(file, who));
    });
    return {answer, abort: () => xhr.abort()};
}
