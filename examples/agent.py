"""A model that MLflow logs and serves, whose every answer comes with its trust score.

Needs OPENAI_API_KEY and CLEANLAB_TLM_API_KEY; without them, run it with --sandbox. To serve it:
mlflow models serve -m MODEL_URI --port 5001 --env-manager local
"""

import mlflow

from tlm_tracing.model import TrustedChatAgent

# What is logged is this file: MLflow runs it again wherever the model is served.
mlflow.models.set_model(
    TrustedChatAgent("gpt-4o", instructions="You are a trivia master.", threshold=0.8)
)

QUESTION = "What is the 3rd month of the year in alphabetical order?"


def main() -> None:
    logged = mlflow.pyfunc.log_model(
        name="trusted-agent", python_model=__file__, pip_requirements=["mlflow", "tlm_tracing"]
    )
    print(f"MODEL_URI is {logged.model_uri}")
    model = mlflow.pyfunc.load_model(logged.model_uri)
    answer = model.predict({"input": [{"role": "user", "content": QUESTION}]})
    print(answer["output"][0]["content"][0]["text"])
    print(answer["custom_outputs"])


if __name__ == "__main__":
    from _sandbox import sandbox_if_asked

    with sandbox_if_asked():
        main()
