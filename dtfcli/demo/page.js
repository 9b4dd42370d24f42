// Tells the inspector's colors whether Gradio shows a dark page; Gradio may run this before or after the page is there.
const follow = () => { document.documentElement.dataset.theme = document.body.classList.contains("dark") ? "dark" : "light"; };
const begin = () => { new MutationObserver(follow).observe(document.body, { attributeFilter: ["class"] }), follow(); };
document.body ? begin() : addEventListener("DOMContentLoaded", begin);
