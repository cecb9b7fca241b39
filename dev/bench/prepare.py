"""Times `prepare --tokenizer gpt2` next to tiktoken's encode_batch.

    python3 dev/bench/prepare.py corpus.txt                    a text, repeated to 40 MB; five rounds
    python3 dev/bench/prepare.py corpus.txt --mb 100 --rounds 7

`prepare` is timed as a whole: reading, encoding, writing shards, sha256 and the manifest. encode_batch gets
the text in memory, in pieces of 64 KB to 1 MB (the fastest in a trial), with one thread per core, and only
builds its lists of tokens. Both run in their own processes and alternate; ratios are medians over rounds, of
wall-clock and of processor time. Passes or fails nothing. Needs tiktoken with GPT-2's vocabulary
(dev/data/gpt2_vocab.py).
"""
import argparse
import concurrent.futures
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
import train_gpt2  # noqa: E402

CORES = os.cpu_count()
if hasattr(os, "sched_getaffinity"):
    CORES = len(os.sched_getaffinity(0))


def seconds():
    """Wall-clock time; processor time of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in used)


def time_ours(corpus, folder):
    """Returns wall-clock and processor seconds of prepare, and its tokens."""
    tokenizer = train_gpt2.GPT2Tokenizer()
    begun = seconds()
    tokens = sum(train_gpt2.prepare([corpus], folder, tokenizer))
    clock = seconds()[0] - begun[0]
    while multiprocessing.active_children():     # their time is counted when they have ended
        time.sleep(0.01)
    return clock, seconds()[1] - begun[1], tokens


def time_tiktoken(corpus, piece):
    """Returns the same of encode_batch, for pieces of `piece` characters."""
    bpe = train_gpt2.GPT2Tokenizer.bpe()
    text = train_gpt2.read_file(corpus).decode()
    pieces = [text[first:first + piece] for first in range(0, len(text), piece)]
    begun = seconds()
    lists = bpe.encode_batch(pieces, num_threads=CORES, disallowed_special=())
    return *(after - before for after, before in zip(seconds(), begun)), sum(map(len, lists))


def in_process(function, *arguments):
    """Calls a function in a new process and returns its result."""
    with concurrent.futures.ProcessPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("corpus", metavar="TEXT", help="a text file, such as tiny Shakespeare")
    parser.add_argument("--mb", type=int, default=40, help="size to repeat it to (40)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each (5)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = os.path.join(folder, "corpus.txt")
        text = train_gpt2.read_file(args.corpus)
        with open(corpus, "wb") as file:
            for _ in range(-(-args.mb * 10**6 // len(text))):
                file.write(text)
        mb = os.path.getsize(corpus) / 1e6
        trials = {piece: in_process(time_tiktoken, corpus, piece)[0] for piece in (1 << 16, 1 << 18, 1 << 20)}
        piece = min(trials, key=trials.get)
        print(f"{mb:.1f} MB, {CORES} cores, encode_batch in pieces of {piece >> 10} KB; wall-clock and"
              " processor seconds")
        rows = []
        for i in range(args.rounds):
            ours, our_cpu, tokens = in_process(time_ours, corpus, os.path.join(folder, f"shards{i}"))
            theirs, their_cpu, _ = in_process(time_tiktoken, corpus, piece)
            rows.append((theirs / ours, their_cpu / our_cpu))
            print(f"prepare {ours:6.2f} {our_cpu:6.2f}   encode_batch {theirs:6.2f} {their_cpu:6.2f}   ratio"
                  f" {rows[-1][0]:.2f} {rows[-1][1]:.2f}   ({tokens:,} tokens)", flush=True)
        for name, ratios in zip(("wall-clock", "processor"), zip(*rows)):
            print(f"prepare / encode_batch speed, {name} time: median {statistics.median(ratios):.2f},"
                  f" from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
