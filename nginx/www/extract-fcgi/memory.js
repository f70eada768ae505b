// What stays on this device, and only where its user says so: who asks, and separately the client key.

const WHO = "extract-fcgi.who";
const KEY = "extract-fcgi.client-key";

/** {company, user, branch} and the key as they were kept; null for each that was not. */
export function recall() {
    try {
        const who = JSON.parse(localStorage.getItem(WHO));
        const known = who !== null && typeof who === "object";
        return {who: known ? who : null, key: localStorage.getItem(KEY)};
    } catch {
        return {who: null, key: null}; // no storage in this browser, or not our JSON
    }
}

/** Keeps what is not null and forgets the rest; false where the browser does not allow it. */
export function keep({who, key}) {
    try {
        for (const [name, value] of [[WHO, who === null ? null : JSON.stringify(who)], [KEY, key]]) {
            if (value === null) localStorage.removeItem(name);
            else localStorage.setItem(name, value);
        }
        return true;
    } catch {
        return false;
    }
}
