"""Job files with one thing wrong, and what must be said about it."""

from __future__ import annotations

BROKEN = {
    "a word for a number": ("rounds: ten", "job.yaml:1: rounds: expected a whole number, not 'ten'"),
    "a number in quotes": ("rounds: '10'", "job.yaml:1: rounds: expected a whole number, not '10'"),
    "a yes for a number": ("rounds: yes", "job.yaml:1: rounds: expected a whole number, not 'yes'"),
    "a fraction for a count": ("rounds: 1.5", "job.yaml:1: rounds: expected a whole number, not 1.5"),
    "a truth for a number": ("rounds: true", "job.yaml:1: rounds: expected a whole number, not true"),
    "a list for a number": ("rounds: [1, 2]", "job.yaml:1: rounds: expected a whole number, not [1, 2]"),
    "a key with a typing error": ("name: a\nrouds: 3", "job.yaml:2: rouds: unknown key; did you mean 'rounds'?"),
    "a key in the wrong place": (
        "seed: 1\nbatch_size: 3",
        "job.yaml:2: batch_size: unknown key; did you mean 'local.batch_size'?",
    ),
    "an abbreviated key": ("local:\n  lr: 1e-3", "job.yaml:2: local.lr: unknown key; did you mean 'learning_rate'?"),
    "a value below its bound": ("model:\n  lora:\n    rank: 0", "job.yaml:3: model.lora.rank: must be at least 1, not"),
    "a word that is none of the choices": (
        "model: {task: text-clasification}",
        "job.yaml:1: model.task: expected 'text-classification', ",
    ),
    "two keys that exclude each other": (
        "local:\n  epochs: 1\n  steps: 2",
        "job.yaml:1: local: give either epochs or steps, not both",
    ),
    "a cohort larger than its population": ("cohort: 9\nclients: 4", "cohort is 9, but there are only 4 clients"),
    "a word for a cohort": ("cohort: all", "job.yaml:1: cohort: expected a whole number or a number, not 'all'"),
    "text where keys belong": ("model: tiny:bert", "job.yaml:1: model: expected keys and values, not 'tiny:bert'"),
    "text where a list belongs": (
        "model: {lora: {targets: query}}",
        "job.yaml:1: model.lora.targets: expected a list, not 'query'",
    ),
    "an infinite learning rate": ("local: {learning_rate: .inf}", "learning_rate: expected a finite number, not inf"),
    "an unknown method": ("method: {name: fedprx}", "there is no method 'fedprx'; did you mean 'fedprox'?"),
    "an unknown setting of a method": (
        "method:\n  name: fedprox\n  nu: 1.0",
        "job.yaml:3: method.nu: unknown key; did you mean 'mu'?",
    ),
    "a setting of a method with the wrong type": (
        "method:\n  name: fedprox\n  mu: '1'",
        "job.yaml:3: method.mu: expected a number, not '1'",
    ),
    "what a method's maths forbids": ("method: {name: ffa-lora}\nmodel: {trainable: full}", "ffa-lora freezes"),
    "a key given twice": ("rounds: 1\nrounds: 2", "job.yaml: line 2: the key 'rounds' is given twice"),
    "a bracket left open": ("data: {fields: [a\nseed: 1", "job.yaml, line 2, column 5, is no valid YAML"),
    "a tab": ("model:\n\tname: x", "job.yaml, line 2, column 1, is no valid YAML"),
    "a list at the top": ("- rounds: 1", "a job file holds keys and values, such as 'rounds: 5', not a list"),
    "a number as a key": ("5: rounds", "job.yaml: line 1: '5' is no key"),
    "something that contains itself": ("data: &d\n  fields: *d", "is no valid YAML"),
    "a control character": ("name: a\x01", "is no valid YAML"),
}  # fmt: skip
