"""A page in the browser: a prompt, a slider for γ, and the continuation with the depth of each token (Gradio)."""
