// The npm openai SDK: answers of the base, a preset and a `steering` field, whole and streamed.
"use strict";

const { OpenAI } = require("openai");

const asked = JSON.parse(process.argv[2]);
const client = new OpenAI({ baseURL: asked.base_url, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: asked.question }];

function chat(model, more) {
  return client.chat.completions.create({
    model,
    messages,
    temperature: 0,
    max_tokens: asked.max_tokens,
    ...more,
  });
}

async function streamed(model, more) {
  let [text, report] = ["", false];
  for await (const chunk of await chat(model, { stream: true, ...more })) {
    text += chunk.choices[0]?.delta.content ?? "";
    report ||= "steering" in chunk;
  }
  return { text, report };
}

async function main() {
  const { steering } = asked;
  const preset = await chat(asked.preset);
  const field = await chat(asked.base, { steering });
  const wrong = { interventions: [{ feature: -1, op: "ablate" }] };
  const refused = await chat(asked.base, { steering: wrong }).catch((error) => error);
  const fieldStreamed = await streamed(asked.base, { steering });
  const response = await client.responses.create({
    model: asked.preset,
    input: asked.question,
    temperature: 0,
    max_output_tokens: asked.max_tokens,
    steering: { report: true },
  });
  console.log(
    JSON.stringify({
      base: (await chat(asked.base)).choices[0].message.content,
      preset: preset.choices[0].message.content,
      field: field.choices[0].message.content,
      streamed: (await streamed(asked.preset)).text,
      "field streamed": fieldStreamed.text,
      response: response.output_text,
      "response report": "steering" in response,
      model: preset.model,
      report: "steering" in field && fieldStreamed.report,
      refused: [refused.status, refused.code, refused.param],
    }),
  );
}

main();
