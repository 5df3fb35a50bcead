"""The commented config that ``spider init`` writes."""

from __future__ import annotations

__all__ = ["STARTER"]

STARTER = """\
# A job for Spider. Check it with `spider validate`, try it with `spider preview`, run it with
# `spider submit`.

server:
  base_url:              # empty: SPIDER_BASE_URL, else http://127.0.0.1:9000
  api_key:               # empty: SPIDER_API_KEY
  request_timeout: 120   # seconds

job:
  model:
    provider: vllm       # vllm, openai (any OpenAI-compatible endpoint) or transformers
    name: "Qwen/Qwen2.5-7B-Instruct"
    # parameters:        # the engine's own arguments
    #   tensor_parallel_size: 4
    # base_url: https://openrouter.ai/api/v1   # provider openai: where the endpoint is
    # api_key_env: OPENROUTER_API_KEY          # the variable that holds its key
    # pricing: {input_per_million: 0.15, output_per_million: 0.60}

  source:
    dataset: "openai/gsm8k"   # a name on the Hub, or a local file or folder
    config_name: main
    split: "train[0:10]"
    field: question           # the column that is the prompt; leave it out for a pre-processor
    # max_examples: 100
    # streaming: true

  generation:
    parameters:
      temperature: 0.7
      top_p: 0.9
      max_tokens: 1024
    # system_prompt: "Answer step by step."
    # duplications: 4         # samples a prompt
    # seed: 17

  output:
    mode: return              # or upload_hf, which needs the section below and HF_TOKEN
    local_path: results.jsonl # on this machine, written when a followed job completes
    # hf:
    #   repo_id: your-name/your-dataset
    #   private: true
"""
