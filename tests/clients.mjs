// Asks the server at argv[2] with the key argv[3] about the picture of argv[4] (a file with its data URL), by OpenAI's
// client for node and by Vercel's AI SDK. Prints one JSON object.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [base, key, file, modules] = process.argv.slice(2);
const from = createRequire(modules + "/");
const load = async name => import(pathToFileURL(from.resolve(name)));
const url = readFileSync(file, "utf8");
const { default: OpenAI } = await load("openai");
const { generateText, streamText } = await load("ai");
const { createOpenAI } = await load("@ai-sdk/openai");

const found = {};
const client = new OpenAI({ baseURL: base + "/v1", apiKey: key, maxRetries: 0 });
const messages = [{
  role: "user",
  content: [{ type: "image_url", image_url: { url } }, { type: "text", text: "What color is the star?" }],
}];
const first = await client.chat.completions.create({ model: "shapes", messages });
found.chat = first.choices[0].message.content;
messages.push(first.choices[0].message, { role: "user", content: "Is there a ring?" });
found.next = (await client.chat.completions.create({ model: "shapes", messages })).choices[0].message.content;
found.stream = "";
for await (const chunk of await client.chat.completions.create({ model: "shapes", messages, stream: true }))
  found.stream += chunk.choices[0]?.delta?.content ?? "";
found.responses = (await client.responses.create({
  model: "shapes",
  input: [{ role: "user", content: [{ type: "input_image", image_url: url, detail: "auto" }, { type: "input_text", text: "What color is the star?" }] }],
})).output_text;
try {
  await client.chat.completions.create({ model: "shapes", messages, temperature: 5 });
} catch (error) { found.error = [error.status, error.param]; }

const openai = createOpenAI({ baseURL: base + "/v1", apiKey: key });
const asked = [{ role: "user", content: [{ type: "image", image: new URL(url) }, { type: "text", text: "What color is the star?" }] }];
for (const [name, model] of [["sdk", openai("shapes")], ["sdk_chat", openai.chat("shapes")]]) {
  const reply = await generateText({ model, messages: asked, maxRetries: 0 });
  found[name] = reply.text;
  const more = [...asked, ...reply.response.messages, { role: "user", content: "Is there a ring?" }];
  found[name + "_next"] = (await generateText({ model, messages: more, maxRetries: 0 })).text;
  found[name + "_stream"] = "";
  for await (const part of streamText({ model, messages: asked, maxRetries: 0 }).textStream) found[name + "_stream"] += part;
}
console.log(JSON.stringify(found));
