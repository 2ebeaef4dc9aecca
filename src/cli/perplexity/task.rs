//! HellaSwag, Winogrande, multiple choice.

use super::Args;
use crate::cli::engine::tell_facts;
use crate::cli::usage_error;
use crate::engine::Engine;
use crate::perplexity::task::{Place, Question, Tally, TaskError, choices, hellaswag, score, winogrande};
use anyhow::Context;
use serde_json::json;
use std::ops::ControlFlow;

/// Questions that are answered together, at most.
const TOGETHER: usize = 32;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Task {
    HellaSwag,
    Winogrande,
    MultipleChoice,
}

pub fn run(a: &Args) -> anyhow::Result<()> {
    let task = Task::of(a);
    if a.kl_divergence_base.is_some() {
        usage_error("--kl-divergence-base: a base file is of a text, expected no questions");
    }
    let bytes = a.bytes()?;
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&bytes);
    let e = a.engine.open()?;
    let questions = task.questions(a, bytes, &e).with_context(|| a.name())?;
    let n = questions.len();
    let most = 4 * a.context();
    if let Some(q) = questions.iter().find(|q| q.positions() > most) {
        let problem = format!("{} tokens, expected at most {most}: four times --ctx-size", q.positions());
        return Err(q.place().error(problem)).with_context(|| a.name());
    }
    let longest = questions.iter().map(Question::positions).max().unwrap_or(1);
    let group = (4 * a.batch_size / longest).clamp(1, TOGETHER);
    let mut s = a.session(&e, longest, group.min(n))?;
    tell_facts(&e, longest);
    tell!("perplexity: {n} questions of at most {longest} tokens, {group} at a time");
    let mut key = a.key(&e, "questions");
    key.add(bytes);
    key.add(format!("{} {n}", task as u8));
    let mut run = a.start(&key, "question", n, group)?;
    if !a.json {
        match task {
            Task::HellaSwag => run.progress.line("\ntask\tacc_norm\t95% confidence interval")?,
            Task::Winogrande => {}
            Task::MultipleChoice => run.progress.line("\ntask\tacc_norm")?,
        }
    }
    let (mut tally, mut each) = (Tally::default(), Vec::new());
    run.drive(
        |_| e.gguf.path(),
        |first, count| Ok(score(&mut s, &questions[first..first + count])?),
        |progress, i, scores| {
            let q = &questions[i];
            let chosen = Question::chosen(scores);
            tally.push(q, scores);
            if a.json {
                let (Place::Line(at) | Place::Task(at)) = q.place();
                each.push(json!({"at": at, "scores": scores, "chosen": chosen, "right": q.is_right(chosen)}));
            } else {
                progress.line(&task.line(i + 1, q, scores, &tally))?;
            }
            // Half of Wilson's interval, which is not 0 where all answers are right, against half of 95 %.
            let (from, to) = tally.interval();
            let narrow = a.until_error.is_some_and(|x| 100.0 * (to - from) / 2.0 / 1.96 <= x);
            Ok(if narrow { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        },
    )?;
    run.done()?;
    if a.json {
        let (p, (from, to)) = (tally.accuracy(), tally.interval());
        let result = json!({"model": e.gguf.path(), "file": a.file, "questions": tally.count, "correct": tally.correct,
            "accuracy": p, "error": tally.error(p), "interval_95": [from, to], "chance": tally.chance(),
            "seconds": run.progress.seconds(), "each_question": each});
        say!("{result}")?;
        return Ok(());
    }
    say!()?;
    task.final_lines(&tally)
}

impl Task {
    fn of(a: &Args) -> Task {
        match (a.hellaswag, a.winogrande) {
            (true, _) => Task::HellaSwag,
            (_, true) => Task::Winogrande,
            _ => Task::MultipleChoice,
        }
    }

    /// The questions of a file.
    fn questions(self, a: &Args, bytes: &[u8], e: &Engine) -> Result<Vec<Question>, TaskError> {
        let t = &e.tokenizer;
        match self {
            Task::HellaSwag => hellaswag(bytes, a.hellaswag_tasks)?.iter().map(|c| c.question(t)).collect(),
            Task::Winogrande => winogrande(bytes, a.winogrande_tasks)?.iter().map(|b| b.question(t)).collect(),
            Task::MultipleChoice => choices(bytes, a.multiple_choice_tasks)?.iter().map(|c| c.question(t)).collect(),
        }
    }

    /// llama-perplexity's line for the `i`th question and all so far.
    fn line(self, i: usize, q: &Question, scores: &[f64], tally: &Tally) -> String {
        let (percent, (from, to)) = (100.0 * tally.accuracy(), tally.interval());
        match self {
            Task::HellaSwag => format!("{i}\t{percent:.8}%\t[{:.4}%, {:.4}%]", 100.0 * from, 100.0 * to),
            Task::Winogrande => {
                let (a, b, chosen) = (scores[0], scores[1], Question::chosen(scores));
                format!("{i}\t{percent:.4}\t{a:10.6}  {b:10.6}  {}  {}", chosen + 1, q.right() + 1)
            }
            Task::MultipleChoice => format!("{i}\t{percent:.8}"),
        }
    }

    /// Its last lines.
    fn final_lines(self, tally: &Tally) -> anyhow::Result<()> {
        let (n, p, chance) = (tally.count, tally.accuracy(), tally.chance());
        let error = tally.error(p);
        match self {
            Task::HellaSwag => say!("Final HellaSwag score({n} tasks): {:.4} +/- {:.4}", 100.0 * p, 100.0 * error)?,
            Task::Winogrande => say!("Final Winogrande score({n} tasks): {:.4} +/- {:.4}", 100.0 * p, 100.0 * error)?,
            Task::MultipleChoice => {
                say!("Final result: {:.4} +/- {:.4}", 100.0 * p, 100.0 * error)?;
                say!("Random chance: {:.4} +/- {:.4}", 100.0 * chance, 100.0 * tally.error(chance))?;
            }
        }
        Ok(())
    }
}
