// Runs GGUF files on llama.cpp, through the prebuilt binary of node-llama-cpp: node llama_cpp.mjs TASK OUT
// Each file of the task: token ids of texts, greedy continuations of token ids with the probabilities of the first next
// token, and the answer to a question through the chat template. Keys and values are cached in float32.
import {readFileSync, writeFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [taskFile, outFile] = process.argv.slice(2);
const task = JSON.parse(readFileSync(taskFile, "utf8"));
const entry = createRequire(task.packages + "/").resolve("node-llama-cpp");
const {getLlama, LlamaChatSession} = await import(pathToFileURL(entry));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});

async function continued(sequence, ids, numTokens) {
    await sequence.clearHistory();
    const tokens = [];
    let probabilities;
    for await (const step of sequence.evaluateWithMetadata(ids, {probabilities: true}, {temperature: 0})) {
        probabilities ??= [...step.probabilities];
        if (tokens.push(step.token) >= numTokens) break;
    }
    return {tokens, probabilities};
}

async function run({path, texts = [], prompts = [], numTokens = 0, question}) {
    const model = await llama.loadModel({modelPath: path});
    const context = await model.createContext({
        contextSize: 512, threads: 1, flashAttention: false,
        experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
    });
    const sequence = context.getSequence();
    const result = {ids: texts.map((text) => [...model.tokenize(text, true)]), continued: []};
    for (const ids of prompts) result.continued.push(await continued(sequence, ids, numTokens));
    if (question !== undefined) {
        await sequence.clearHistory();
        const session = new LlamaChatSession({contextSequence: sequence});
        result.answer = await session.prompt(question, {temperature: 0, maxTokens: 32});
    }
    await model.dispose();
    return result;
}

const results = {};
for (const [name, file] of Object.entries(task.files)) {
    try {
        results[name] = await run(file);
    } catch (error) {
        results[name] = {error: String(error)};
    }
}
writeFileSync(outFile, JSON.stringify(results));
process.exit(0);
