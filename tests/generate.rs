//! What a generation tells its listener, and what it reports when it is stopped, on the default model.

use oxcart::draft::Drafter;
use oxcart::engine::{Engine, EngineOptions, Session, SessionOptions};
use oxcart::generate::{Event, generate};
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
