// All words of the page. Another language: a translated copy of this file in its place.

export const language = "en";

export const texts = {
    title: "Invoices",
    subtitle: "Turn PDFs and pictures of invoices into data.",

    // Who asks
    who: "Who is asking",
    company: "Company",
    user: "Your name",
    branch: "Branch",
    optional: "(optional)",
    key: "Client key",
    keyOptional: "(if you have one)",
    remember: "On this device",
    rememberWho: "Remember company, name and branch",
    rememberKey: "Remember the client key, too",
    rememberKeyHint: "It is then kept, readable, in this browser. Only on a device that is yours alone.",
    forget: "Forget everything",
    forgotten: "Forgotten: nothing is kept on this device any more.",
    cannotRemember: "This browser does not let the page remember anything.",

    // Mistakes in the form
    missing: (label) => `${label} is missing.`,
    tooLong: (label) => `${label} is too long: at most 256 bytes.`,
    controlCharacter: (label) => `${label} holds a character that is not text.`,
    badKey: "It holds a character that no client key has.",
    noFiles: "Choose an invoice first.",

    // Files
    files: "Invoices",
    drop: "Drop invoices here, or paste a picture",
    dropTouch: "Choose invoices, or take a photograph",
    choose: "Choose files",
    photograph: "Take a photograph",
    formats: "PDF, PNG, JPEG, WEBP, HEIC.",
    limit: (most) => `Up to ${most} each.`,
    costs: "Each invoice that is read uses up some of your company’s tokens.",
    start: (count) => (count === 0 ? "Read invoices" : count === 1 ? "Read 1 invoice" : `Read ${count} invoices`),
    folder: (name) => `${name} is a folder: choose the files in it.`,
    twice: (name) => `${name} is in the list already.`,
    added: (name) => `${name} added.`,
    addedMany: (count) => `${count} files added.`,

    // The list
    queue: "Your list",
    summary: ({ready, active, done, failed}) => [
        ready && `${ready} ready`, active && `${active} under way`, done && `${done} read`, failed && `${failed} not read`,
    ].filter(Boolean).join(" · "),
    states: {
        ready: "Ready",
        queued: "Waiting for its turn",
        uploading: "Uploading",
        waiting: "Reading",
        delayed: "Will be sent again",
        done: "Read",
        failed: "Not read",
        stopped: "Stopped",
    },
    uploaded: (sent, total) => `${sent} of ${total} sent`,
    reading: (seconds) => `The invoice is being read (${seconds} s). This takes some 5 to 20 seconds, at worst two minutes.`,
    named: (what, name) => `${what}: ${name}`, // what a button is called where its place does not tell
    remove: "Remove",
    cancel: "Cancel",
    stop: "Stop waiting",
    show: "Show",
    hide: "Hide",
    cancelled: "Cancelled before it was sent whole. Nothing was used up.",
    stoppedWaiting: "You stopped waiting. The service goes on with this invoice all the same, and it counts. “Ask again” tells what became of it; it is never paid for twice.",
    leaving: "Invoices are still under way.",

    // Failures
    tooLarge: (big, bytes, limit) => `This file makes an upload of ${big} (${bytes} bytes), and the limit is ${limit}. It was not sent.`,
    unreadable: "The browser cannot read this file. It was not sent.",
    noAnswer: "The connection broke before an answer came.",
    timeout: "No answer came in time.",
    notSent: "The connection broke before the upload was complete.",
    notUnderstood: (status) => `Something other than the service answered (HTTP ${status}).`,
    requestId: "Request",
    copyRequestId: "Copy the request ID",
    againIn: (seconds, turn, turns) => `It will be sent again in ${seconds} s (${turn} of ${turns}). Nothing was used up.`,
    waitFor: (seconds) => `Possible again in ${duration(seconds)}.`,
    again: "Try again",
    ask: "Ask again",
    anew: "Read it again, and pay again",
    nothingSpent: "Nothing was used up.",
    spent: "Tokens were used up, or may have been.",
    advice: {
        bad_request: "Correct what it names, then try again.",
        unauthenticated: "Check the client key, then try again.",
        forbidden: "Check company and client key: they must belong together.",
        file_too_large: "Make it smaller, or split it: a lower resolution is enough for a scan.",
        unsupported_media_type: "This kind of file cannot be read. Save it as PDF, PNG or JPEG.",
        invalid_file: "The file is empty, damaged, or nothing that could be read as an invoice. Try another copy of it.",
        request_in_progress: "This invoice was sent before and is still being read. Ask again in a moment; it is never paid for twice.",
        already_processed: "This invoice was sent before and has been paid for; the service keeps no copy of the result. To have it now, it must be read again.",
        token_expired: "Nothing can be read until then.",
        token_unavailable: "Nothing can be read until then.",
        no_active_token: "Check the company’s spelling, too.",
        upstream_rejected: "The service is not set up right. Tell whoever runs it, with the request number.",
        upstream_unavailable: "The AI service is out of order at the moment. Try again later.",
        invalid_answer: "The AI did not answer as it should. A clearer copy of the invoice may help.",
        internal_error: "Tell whoever runs the service, with the request number.",
        unknown: "What became of it is not known. “Ask again” tells; it is never paid for twice.",
        retryable: "Try again later.",
        other: "Tell whoever runs the service, with the request number.",
    },

    // The result
    result: (name) => `What was read from ${name}`,
    document: "The document",
    documentNamed: (name) => `The document ${name}`,
    noPreview: "This browser cannot show this kind of file.",
    openDocument: "Open in a new tab",
    copyJson: "Copy JSON",
    copyCsv: "Copy CSV",
    downloadJson: "Download JSON",
    downloadCsv: "Download CSV",
    allJson: "Download all as JSON",
    allCsv: "Download all as CSV",
    copied: "Copied.",
    cannotCopy: "The browser does not allow copying.",
    warnings: (count) => (count === 1 ? "One thing to check" : `${count} things to check`),
    warning: "To check:",
    used: ({model, tokens, attempts}) =>
        `${model} · ${tokens} tokens · ${attempts === 1 ? "1 call" : `${attempts} calls`}`,
    absent: "not stated",
    invoice: "Invoice",
    documentTypes: {
        invoice: "Invoice", credit_note: "Credit note", receipt: "Receipt", proforma: "Pro forma invoice",
        reminder: "Reminder", other: "Document",
    },
    lines: "Lines",
    none: "None were read.",
    taxes: "Taxes",
    more: "More",
    yes: "yes",
    no: "no",
    fields: {
        document_type: "Kind", invoice_number: "Number", issue_date: "Date", due_date: "Due", currency: "Currency",
        purchase_order: "Purchase order", payment_terms: "Terms of payment", vendor: "From", customer: "To",
        name: "Name", tax_id: "Tax number", registration_id: "Register number", address: "Address", email: "E-mail",
        iban: "IBAN", bic: "BIC", line_items: "Lines", description: "Description", product_code: "Article",
        quantity: "Quantity", unit: "Unit", unit_price: "Unit price", tax_rate: "Tax %", tax_amount: "Tax",
        amount: "Amount", taxes: "Taxes", rate: "Rate %", base: "Base", totals: "Totals", subtotal: "Subtotal",
        discount: "Discount", tax: "Tax", total: "Total", amount_paid: "Paid", amount_due: "To pay",
    },

    // What is said to those who do not see it
    said: {
        uploading: (name) => `${name}: uploading.`,
        waiting: (name) => `${name}: uploaded, being read.`,
        delayed: (name, detail, seconds) => `${name}: ${detail} It will be sent again in ${seconds} seconds.`,
        done: (name, warnings) => `${name}: read${warnings ? `, ${warnings} to check` : ""}.`,
        failed: (name, detail) => `${name}: not read. ${detail}`,
        stopped: (name) => `${name}: stopped.`,
        removed: (name) => `${name} removed.`,
    },
};

/** Of the dashboard. */
export const dashboardTexts = {
    title: "Dashboard",
    subtitle: "Tokens, usage and faults, as the store has them. Times are UTC.",
    toPage: "Invoices",
    key: "Administrator’s key",
    keyHint: "extractctl client-key add --admin makes one.",
    remember: "Remember the key on this device",
    forget: "Forget the key",
    forgotten: "Forgotten: the key is not kept on this device any more.",
    period: "Period",
    periods: {"24h": "24 hours", "7d": "7 days", "30d": "30 days", "90d": "90 days", dates: "From … to …"},
    from: "From",
    to: "To, inclusive",
    company: "Company",
    all: "(all)",
    show: "Show",
    showing: "Asking …",
    shown: (time) => `As of ${time}.`,
    missingKey: "The administrator’s key is missing.",
    badDates: "Give both dates, the earlier one first.",
    notHere: "The web server lets administrators in from certain machines only, as shipped from the server itself (nginx/README.md, “For administrators”).",
    noAnswer: "No answer came.",
    notUnderstood: (status) => `Something other than the service answered (HTTP ${status}).`,
    requestId: (id) => `Request ${id}`,
    more: "More rows",
    csv: "CSV",
    named: (what, panel) => `${what}: ${panel}`,
    saved: (name) => `${name} saved.`,
    nothing: "Nothing.",
    asTable: "As a table",
    panels: {
        overview: "At a glance", tokens: "Tokens", time: "Usage over time", share: "Who used it", errors: "Recent errors",
        retries: "Failed calls to Gemini", unsettled: "Unsettled requests", outbox: "Outbox",
    },
    notes: {
        unsettled: "Calls that may have been billed without a record.",
        outbox: "What this server holds until the store takes it.",
    },
    cards: {
        active: "Active tokens", over: "Over their threshold", cooling: "Cooling down", out: "Expired, exceeded, disabled",
        used: "Used, of the limits", remaining: "Remaining", reserved: "Reserved", unsettled: "Unsettled", waiting: "Waiting in the outbox",
        dead: "Dead in the outbox",
    },
    unlimited: (count) => `and ${count} without a limit`,
    atLeast: (count) => `${count} or more`,
    by: "By",
    share: {company: "Company", branch: "Branch", user: "User", token: "Token"},
    unnamed: "(none)",
    series: {day: "Day", tokens: "Tokens", requests: "Requests"},
    largest: (count) => `The largest ${count}.`,
    plotTime: (days, tokens, requests) => `${tokens} tokens in ${requests} requests on ${days} days.`,
    plotShare: (name, tokens) => `Largest: ${name}, ${tokens} tokens.`,
    of: (used, limit) => `${used} of ${limit}`,
    noLimit: (used) => `${used}, no limit`,
    overThreshold: "over its threshold",
    coolingUntil: (time) => `cools down until ${time}`,
    yes: "yes",
    no: "no",
    columns: {
        Status: "Status", TokenID: "Token", CompanyID: "Company", CompanyName: "Name", ApiKey: "Key", Used: "Used",
        TotalRemainingTokens: "Remaining", ReservedTokens: "Reserved", Threshold: "Threshold", StatusReason: "Reason", CreatedAt: "Created",
        Day: "Day", Branch: "Branch", RequestedBy: "User", TokenSource: "Source", Requests: "Requests", RequestCount: "Calls",
        InputTokens: "Input", OutputTokens: "Output", TotalTokensUsed: "Tokens", UnknownCalls: "Unknown calls", Timestamp: "Time",
        LogLevel: "Level", Message: "Message", Exception: "Cause", RequestID: "Request", Host: "Host", Attempt: "Attempt",
        StatusCode: "HTTP", ErrorMessage: "Error", IsRetryable: "Retryable", EstimatedTokens: "Estimated", State: "State", Kind: "Kind",
        Attempts: "Attempts", LastError: "Last error",
    },
};

function duration(seconds) {
    return seconds <= 120 ? `${seconds} s` : `${Math.ceil(seconds / 60)} min`;
}

const digits = new Intl.NumberFormat(language, {maximumFractionDigits: 1});

/** A size for people: as nginx and the service count, 1 MB is 1024 * 1024 bytes. */
export function size(bytes) {
    if (bytes < 1024) return `${digits.format(bytes)} bytes`;
    if (bytes < 1024 * 1024) return `${digits.format(bytes / 1024)} KB`;
    return `${digits.format(bytes / 1024 / 1024)} MB`;
}

export const number = (value) => new Intl.NumberFormat(language).format(value);

/** What a field is called that a schema of somebody's own has: "delivery_note" is "Delivery note". */
export function fieldLabel(name) {
    if (Object.hasOwn(texts.fields, name)) return texts.fields[name];
    const words = String(name).replaceAll("_", " ").trim();
    return words ? words[0].toUpperCase() + words.slice(1) : String(name);
}
