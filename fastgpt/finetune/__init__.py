"""Fine-tuning a pretrained GPT: answers in conversations, classes of texts, numbers for texts.

records    reading labelled texts and conversations
classify   heads for classes and numbers, training and prediction;  head: the module;  scores: what is measured
loop       the training loop;  recipe, options: what it is told
command    `fastgpt finetune`, `predict` and `chat`
"""
