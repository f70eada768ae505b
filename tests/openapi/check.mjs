// Is nginx/openapi.yaml an OpenAPI 3.1 document, by the OpenAPI Initiative's own schema?
import {Validator} from "@seriousme/openapi-schema-validator";
import {fileURLToPath} from "node:url";

const validator = new Validator();
const file = fileURLToPath(new URL("../../nginx/openapi.yaml", import.meta.url));
const result = await validator.validate(file);
if (!result.valid || validator.version !== "3.1") {
    console.error(`${file}: OpenAPI ${validator.version}`, JSON.stringify(result.errors, null, 2));
    process.exit(1);
}
console.log(`nginx/openapi.yaml: OpenAPI ${validator.version}`);
