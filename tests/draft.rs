//! Guesses at the tokens to come, on the default model: they change nothing but the time.

use assert_cmd::Command;
use oxcart::draft::{DraftError, Drafter};
use oxcart::engine::{Engine, EngineOptions, SessionOptions};
use oxcart::generate::{End, Event, Report, generate};
use oxcart::sample::{SampleParams, Sampler};
use oxcart_quant::{Isa, Kernels};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn model() -> PathBuf {
    oxcart::catalog::default_model().expect("the default model can be fetched")
}

fn options(kernels: &'static Kernels) -> EngineOptions {
    EngineOptions { threads: 2, kernels, ..EngineOptions::default() }
}

fn engine() -> Arc<Engine> {
    Arc::new(Engine::open(&model(), &options(Kernels::best())).expect("it opens"))
}

/// A prompt whose answer repeats it, and one whose answer does not.
const PROMPTS: [&str; 2] = [
    "Carts: oak cart, ash cart, elm cart, fir cart. Again, carts: oak cart, ash cart, elm cart, fir cart. Again, carts:",
    "The river rises in the hills to the north and",
];

/// What was generated, and the tokens that the session holds afterwards.
fn told(
    e: &Arc<Engine>,
    context: usize,
    (prompt, params, limit): (&str, &SampleParams, Option<usize>),
    d: &mut Drafter,
    mut listen: impl FnMut(&str) -> ControlFlow<()>,
) -> (Report, Vec<u32>) {
    let mut s = e.session(&SessionOptions { context, ..SessionOptions::default() }).unwrap();
    let prompt = e.tokenizer.encode(prompt.as_bytes(), true, false).unwrap();
    let r = generate(&mut s, &mut Sampler::new(params.clone()), d, &prompt, limit, |event| match event {
        Event::Text { text, .. } => listen(text),
        Event::Prompt { .. } => ControlFlow::Continue(()),
    });
    (r.unwrap(), s.tokens(0).to_vec())
}

#[test]
fn the_text_is_the_same_whatever_is_guessed() {
    let greedy = SampleParams { temp: 0.0, ..SampleParams::default() };
    let drawn = SampleParams { seed: Some(1), repeat_penalty: 1.1, ..SampleParams::default() };
    for kernels in [Isa::Avx2, Isa::AvxVnni, Isa::Avx512].into_iter().filter_map(Kernels::for_isa) {
        let e = Arc::new(Engine::open(&model(), &options(kernels)).unwrap());
        for prompt in PROMPTS {
            for params in [&greedy, &drawn] {
                let ask = (prompt, params, Some(60));
                let go_on = |_: &str| ControlFlow::Continue(());
                let (want, held) = told(&e, 256, ask, &mut Drafter::new(0), go_on);
                assert_eq!((want.drafted, want.accepted), (0, 0));
                for most in [1, 3, 7] {
                    let mut d = Drafter::always(most);
                    if most == 3 {
                        d.add_model(&e, &model(), &options(kernels), &SessionOptions::default()).unwrap();
                    }
                    let (got, holds) = told(&e, 256, ask, &mut d, go_on);
                    let what = format!("{} {prompt:?} {params:?}, {most} guesses", kernels.label());
                    assert_eq!(got.generated, want.generated, "{what}");
                    assert_eq!((got.end, holds), (want.end, held.clone()), "{what}: what is left behind");
                    let drafts = prompt == PROMPTS[0] || most >= 3;
                    assert!(got.accepted <= got.drafted && (!drafts || got.drafted > 0), "{what}: {got:?}");
                }
            }
        }
    }
}

#[test]
fn a_text_that_repeats_itself_and_a_model_that_agrees_are_believed() {
    let e = engine();
    let greedy = SampleParams { temp: 0.0, ..SampleParams::default() };
    let go_on = |_: &str| ControlFlow::Continue(());
    let (r, _) = told(&e, 256, (PROMPTS[0], &greedy, Some(48)), &mut Drafter::always(7), go_on);
    assert!(r.accepted >= 30, "{r:?}");
    // The model itself agrees with every guess that it made.
    let mut d = Drafter::always(7);
    d.add_model(&e, &model(), &options(Kernels::best()), &SessionOptions::default()).unwrap();
    let (r, _) = told(&e, 256, (PROMPTS[1], &greedy, Some(48)), &mut d, go_on);
    assert!(r.accepted >= 30 && r.drafted - r.accepted <= 7, "{r:?}");
}

/// Where a text is broken off between tokens that one pass gave, or ends, the session holds what was told and no more.
#[test]
fn an_end_in_the_middle_of_a_pass_leaves_nothing_untold() {
    let e = engine();
    let greedy = SampleParams { temp: 0.0, ..SampleParams::default() };
    let prompt = e.tokenizer.encode(PROMPTS[0].as_bytes(), true, false).unwrap();
    for stop in 1..24 {
        let mut heard = 0;
        let listen = |_: &str| {
            heard += 1;
            if heard == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let (r, held) = told(&e, 256, (PROMPTS[0], &greedy, None), &mut Drafter::always(7), listen);
        assert_eq!(r.end, End::Stopped);
        let all = [&prompt[..], &r.generated].concat();
        assert_eq!(held, all[..all.len() - 1], "stopped at text {stop}");
        // By a limit, and by the context.
        let go_on = |_: &str| ControlFlow::Continue(());
        let (r, held) = told(&e, 256, (PROMPTS[0], &greedy, Some(stop)), &mut Drafter::always(7), go_on);
        assert_eq!((r.end, r.generated.len()), (End::Length, stop));
        assert_eq!(held, [&prompt[..], &r.generated[..stop - 1]].concat(), "{stop} tokens");
        let (r, held) = told(&e, prompt.len() + stop, (PROMPTS[0], &greedy, None), &mut Drafter::always(7), go_on);
        assert_eq!((r.end, held.len(), r.generated.len()), (End::Context, prompt.len() + stop, stop + 1));
    }
}

/// One drafter serves one text after another, and a context that is shifted.
#[test]
fn a_drafter_goes_on_with_other_texts() {
    let e = engine();
    let greedy = SampleParams { temp: 0.0, ..SampleParams::default() };
    let mut d = Drafter::always(7);
    d.add_model(&e, &model(), &options(Kernels::best()), &SessionOptions { context: 64, ..SessionOptions::default() })
        .unwrap();
    for prompt in [PROMPTS[1], PROMPTS[0], PROMPTS[1], "A"] {
        let mut texts = Vec::new();
        for drafter in [&mut d, &mut Drafter::new(0)] {
            let mut s = e.session(&SessionOptions { context: 48, ..SessionOptions::default() }).unwrap();
            s.shift_when_full(4);
            let ids = e.tokenizer.encode(prompt.as_bytes(), true, false).unwrap();
            let r = generate(&mut s, &mut Sampler::new(greedy.clone()), drafter, &ids, Some(70), |_| {
                ControlFlow::Continue(())
            });
            texts.push(r.unwrap().generated);
        }
        assert_eq!(texts[0], texts[1], "{prompt:?}");
    }
}

/// A prompt longer than a pass is read by the draft model between tokens.
#[test]
fn a_draft_model_catches_up_with_a_long_prompt() {
    let e = engine();
    let greedy = SampleParams { temp: 0.0, ..SampleParams::default() };
    let mut d = Drafter::always(7);
    let small = SessionOptions { context: 256, ubatch: 8, ..SessionOptions::default() };
    d.add_model(&e, &model(), &options(Kernels::best()), &small).unwrap();
    let (r, _) = told(&e, 256, (PROMPTS[0], &greedy, Some(48)), &mut d, |_| ControlFlow::Continue(()));
    let (want, _) = told(&e, 256, (PROMPTS[0], &greedy, Some(48)), &mut Drafter::new(0), |_| ControlFlow::Continue(()));
    assert_eq!(r.generated, want.generated);
    // It agrees with itself once it is there: four pieces of the prompt come first.
    assert!(r.accepted >= 30 && r.passes >= 10, "{r:?}");
}

/// The default model, but that some letters of its vocabulary are others.
fn other_vocabulary(to: &Path) {
    let mut bytes = fs::read(model()).unwrap();
    let find = |what: &str| bytes.windows(what.len()).position(|w| w == what.as_bytes()).expect("a key of the file");
    let (from, end) = (find("tokenizer.ggml.tokens") + 40, find("tokenizer.ggml.token_type"));
    let (merges, last) = (find("tokenizer.ggml.merges") + 40, find("tokenizer.ggml.bos_token_id"));
    assert!(from < end && merges < last, "keys in the order of llama.cpp's converter");
    for range in [from..end, merges..last] {
        for i in range {
            // What is before a zero is a length.
            if bytes[i].is_ascii_uppercase() && bytes[i + 1] != 0 {
                bytes[i] = b'A' + (bytes[i] - b'A' + 13) % 26;
            }
        }
    }
    fs::write(to, bytes).unwrap();
}

#[test]
fn a_model_with_another_vocabulary_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("other.gguf");
    other_vocabulary(&other);
    let e = engine();
    let added = Drafter::new(7).add_model(&e, &other, &options(Kernels::best()), &SessionOptions::default());
    assert!(matches!(added, Err(DraftError::Vocabulary { differing: 129.., .. })), "{:?}", added.err());
    let out =
        Command::cargo_bin("oxcart").unwrap().args(["run", "-p", "A", "-n", "1", "-md"]).arg(&other).output().unwrap();
    let err = String::from_utf8(out.stderr).unwrap();
    let last = err.lines().last().unwrap_or_default();
    assert!(
        out.status.code() == Some(1) && last.contains("other.gguf cannot draft for") && last.contains("differ"),
        "{err}"
    );
    let out = Command::cargo_bin("oxcart").unwrap().args(["run", "-p", "A", "-md", "nowhere.gguf"]).output().unwrap();
    assert_eq!(out.status.code(), Some(1), "{out:?}");
}
