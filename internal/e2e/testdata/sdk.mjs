// The official SDK, unmodified: sdk.mjs BASE_URL AUTHORIZATION TEXT
// prints one JSON object about a chat, a prompt and the event stream.
import { createOpencodeClient } from "@opencode-ai/sdk";

const [baseUrl, authorization, text] = process.argv.slice(2);
const client = createOpencodeClient({ baseUrl, headers: { authorization }, throwOnError: true });

const { stream } = await client.event.subscribe();
const chat = (await client.session.create({ body: { title: "from the SDK" } })).data;
const types = [];
const idle = (async () => {
  for await (const event of stream) {
    types.push(event.type);
    if (event.type === "session.idle" && event.properties.sessionID === chat.id) return true;
  }
  return false;
})();
const answer = (await client.session.prompt({ path: { id: chat.id }, body: { parts: [{ type: "text", text }] } })).data;
const sawIdle = await Promise.race([idle, new Promise((r) => setTimeout(r, 20_000, false).unref())]);
const list = (await client.session.list()).data;
console.log(
  JSON.stringify({
    chat: chat.id,
    listed: list.some((c) => c.id === chat.id),
    text: answer.parts.filter((p) => p.type === "text").map((p) => p.text).join(""),
    sawIdle,
    types: [...new Set(types)],
  }),
);
process.exit(0);
