//! What a generation tells its listener, and what it reports when it is stopped, on the default model.

use oxcart::draft::Drafter;
use oxcart::engine::{Engine, EngineOptions, Session, SessionOptions};
use oxcart::generate::{End, Event, Report, generate};
use oxcart::sample::{SampleParams, Sampler};
use std::ops::ControlFlow::{Break, Continue};
use std::sync::Arc;

fn session() -> Session {
    let path = oxcart::catalog::default_model().expect("the default model can be fetched");
    let e = Arc::new(Engine::open(&path, &EngineOptions { threads: 2, ..EngineOptions::default() }).expect("it opens"));
    e.session(&SessionOptions { context: 256, ubatch: 16, ..SessionOptions::default() }).unwrap()
}

#[test]
fn a_stopped_prompt_is_reported_as_far_as_it_was_fed() {
    let mut s = session();
    let prompt = s.engine().tokenizer.encode("one ox, ".repeat(40).as_bytes(), true, false).unwrap();
    let mut sampler = Sampler::new(SampleParams::default());
    let mut heard = Vec::new();
    for stop in [16, 48] {
        let r = generate(&mut s, &mut sampler, &mut Drafter::new(0), &prompt, None, |event| match event {
            Event::Prompt { done, of } => {
                heard.push((done, of));
                if done >= stop { Break(()) } else { Continue(()) }
            }
            Event::Text { .. } => Continue(()),
        });
        let r = r.unwrap();
        assert_eq!((r.fed, r.generated.len()), (stop, 0), "{r:?}");
        assert_eq!(r.reused + r.fed, s.len(0), "{r:?}");
    }
    let n = prompt.len();
    assert_eq!(heard, [(16, n), (16, n - 16), (32, n - 16), (48, n - 16)]);
}

/// Generates nothing but the token `id`, nine times or stopped after so many; the texts that were heard.
fn forced(s: &mut Session, id: u32, stop: usize) -> (Report, Vec<String>) {
    let params = SampleParams { temp: 0.0, logit_bias: vec![(id, 1e6)], ..SampleParams::default() };
    let prompt = s.engine().tokenizer.encode(b"one ox", true, false).unwrap();
    let mut texts = Vec::new();
    let r = generate(s, &mut Sampler::new(params), &mut Drafter::new(0), &prompt, Some(9), |event| {
        if let Event::Text { text, tokens, .. } = event {
            texts.push(text.to_string());
            assert_eq!(tokens, texts.len().min(9), "tokens so far");
        }
        if texts.len() == stop { Break(()) } else { Continue(()) }
    });
    (r.unwrap(), texts)
}

#[test]
fn a_model_that_says_only_control_tokens_can_be_stopped() {
    let mut s = session();
    let t = &s.engine().clone().tokenizer;
    let id = (0..t.n_vocab() as u32).find(|&id| t.is_control(id) && !t.is_eog(id)).expect("a control token");
    let (r, texts) = forced(&mut s, id, 3);
    assert_eq!((r.end, r.generated, texts), (End::Stopped, vec![id; 3], vec![String::new(); 3]));
}

/// Bytes that begin a character which never comes to its end.
#[test]
fn half_a_character_is_told_where_a_text_ends_and_not_where_it_is_stopped() {
    let mut s = session();
    let t = &s.engine().clone().tokenizer;
    let half = |id: &u32| t.piece(*id) == [0xe4] && !t.is_control(*id);
    let id = (0..t.n_vocab() as u32).find(half).expect("a token of a byte");
    let (r, texts) = forced(&mut s, id, 1);
    assert_eq!((r.end, texts.concat().as_str()), (End::Stopped, ""));
    let (r, texts) = forced(&mut s, id, usize::MAX);
    assert_eq!((r.end, texts.concat()), (End::Length, "\u{fffd}".repeat(9)));
}
