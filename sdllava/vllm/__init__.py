"""A plugin with which vLLM serves this package's models. vLLM finds it through the group `vllm.general_plugins`."""
