"""Stands in for gcloud, kubectl, …: writes its argv as a line of $STAND_IN/calls and plays the answers given to it.

$STAND_IN/answers.json is {"text that stands in the call": [[output, exit code], …]}: the first text that fits counts;
its answers come one after another, the last of them from then on.
"""

import json
import os
import sys

folder, argv = os.environ["STAND_IN"], sys.argv[1:]
with open(f"{folder}/calls", "a", encoding="utf-8") as calls:
    calls.write(json.dumps(argv) + "\n")
with open(f"{folder}/answers.json", encoding="utf-8") as file:
    answers = json.load(file)
for text, scripted in answers.items():
    if text in " ".join(argv):
        output, code = scripted.pop(0) if len(scripted) > 1 else scripted[0]
        with open(f"{folder}/answers.json", "w", encoding="utf-8") as file:
            json.dump(answers, file)
        print(output, file=sys.stderr if code else sys.stdout)
        sys.exit(code)
