"""The official OpenAI client against a running server: `python examples/openai_client.py [URL]`.

Start the server first: `make serve`.
"""

import sys

try:
    import openai
except ImportError:
    raise SystemExit("this example needs the client: pip install openai") from None


def main() -> None:
    url = sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    # A server without --api-key takes any key; the client insists on one.
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    try:
        model = client.models.list().data[0].id
    except openai.APIConnectionError:
        raise SystemExit(f"no server at {url}; start one with 'make serve'") from None

    # The client asks for base64 by itself and decodes it: less than half the bytes, and no numbers to parse.
    answer = client.embeddings.create(model=model, input=["First document", "Second document"])
    for item in answer.data:
        print(f"{item.index}: {len(item.embedding)} numbers, the first {item.embedding[0]:.6f}")
    print(f"{answer.usage.total_tokens} tokens")

    # Fields that OpenAI's API lacks go into extra_body.
    cut = client.embeddings.create(model=model, input="word " * 1000, extra_body={"truncate_prompt_tokens": -1})
    print(f"1000 words, cut to the model's maximum: {cut.usage.prompt_tokens} tokens")

    # Without it an over-long input is an error, as at OpenAI; it names the item and the limit.
    try:
        client.embeddings.create(model=model, input=["short", "word " * 1000])
    except openai.BadRequestError as error:
        print(f"{error.status_code} {error.code} ({error.param}): {error.body['message']}")


if __name__ == "__main__":
    main()
