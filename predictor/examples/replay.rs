//! Prints how well traces are foreseen by an ideal cache: coverage (reads that need not wait), precision (proposed
//! pages used), traffic (pages read from the store for each page needed), time for each access.
//!
//! `replay [--threshold P] TRACE.csv[,MARKS.txt] …`: each trace alone with nothing learned; then, if there are several,
//! each with what the one before it taught, as one boot and with the boot ended at the mark `boot-done`.
//! A trace is CSV with a header, `ts_us,op,offset,len` in bytes.

#[path = "../tests/support/mod.rs"]
mod support;

use prestage_predictor::{AccessConfig, AccessPredictor, Expert, Phase};
use std::time::Instant;
use support::{Event, Figures, Replay, later, trace};

fn run(predictor: &mut AccessPredictor, events: &[Event], threshold: f32, boot: Option<bool>) {
    // An hour after whatever was before, on an emptied cache.
    let start_us = predictor.stats().reads * 3_600_000_000;
    let events = &later(events, start_us);
    predictor.forget_resident();
    let mut cache = Replay::new(threshold);
    let mut parts: Vec<(String, Figures)> = vec![("start".into(), Figures::default())];
    if boot.is_some() {
        predictor.phase_start(1, Phase::Boot, start_us);
        cache.drain(predictor, start_us, &mut parts[0].1);
    }
    let mut end_us = start_us;
    for event in events {
        match event {
            Event::Mark(at_us, mark) => {
                if mark == "boot-done" && boot == Some(false) {
                    predictor.phase_end(1, *at_us);
                }
                parts.push((mark.clone(), Figures::default()));
            }
            Event::Access(access) => {
                end_us = access.at_us;
                if let Some((_, figures)) = parts.last_mut() {
                    cache.step(predictor, access, figures);
                }
            }
        }
    }
    predictor.phase_end(1, end_us);
    predictor.vm_forget(1);
    let mut all = Figures::default();
    for (name, part) in &parts {
        all += part;
        if parts.len() > 1 && part.reads > 20 {
            println!(
                "    {name:<14} {:6} reads, coverage {:.3}, precision {:.3} of {} pages, spatial {:?}",
                part.reads,
                part.coverage(),
                part.precision(),
                part.proposed_pages,
                part.by_expert[3]
            );
        }
    }
    println!(
        "    total: {} reads, coverage {:.3}, precision {:.3}, traffic {:.3}, {} candidates of {:.1} pages, \
         wait {:.2} s of {:.2} s",
        all.reads,
        all.coverage(),
        all.precision(),
        all.traffic(),
        all.candidates,
        all.proposed_pages as f64 / all.candidates.max(1) as f64,
        all.wait_us as f64 / 1e6,
        all.plain_wait_us as f64 / 1e6,
    );
    for expert in Expert::ALL {
        let (proposed, used) = all.by_expert[expert.index()];
        if proposed > 0 {
            print!("    {} {:.2} of {proposed}", expert.name(), used as f64 / proposed as f64);
        }
    }
    println!();
    for (proposed, used, sum) in all.by_probability.into_iter().filter(|(proposed, ..)| *proposed > 0) {
        print!("    said {:.2} was {:.2} ({proposed})", sum / proposed as f64, used as f64 / proposed as f64);
    }
    println!();
}

fn main() {
    let mut threshold = 0.5;
    let mut traces = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--threshold" {
            threshold = arguments.next().and_then(|value| value.parse().ok()).unwrap_or(threshold);
            continue;
        }
        let (path, marks) = argument.split_once(',').unwrap_or((&argument, ""));
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        traces.push((path.to_owned(), trace(&read(path), &read(marks))));
    }
    for (path, events) in &traces {
        println!("{path}, nothing learned, probability >= {threshold}");
        run(&mut AccessPredictor::new(AccessConfig::default()), events, threshold, None);
        let mut predictor = AccessPredictor::new(AccessConfig::default());
        let (mut out, mut count) = (Vec::new(), 0u32);
        let begin = Instant::now();
        for event in events {
            if let Event::Access(access) = event {
                predictor.observe(access);
                predictor.predict(access.at_us, &mut out);
                out.clear();
                count += 1;
            }
        }
        println!(
            "    {} ns an access, {} KiB",
            begin.elapsed().as_nanos() / u128::from(count.max(1)),
            predictor.memory_bytes() >> 10
        );
    }
    for pair in traces.windows(2) {
        for all_boot in [true, false] {
            println!(
                "{} after {}, {}",
                pair[1].0,
                pair[0].0,
                if all_boot { "all one boot phase" } else { "boot phase ended at its mark" }
            );
            let mut predictor = AccessPredictor::new(AccessConfig::default());
            for (_, events) in pair {
                run(&mut predictor, events, threshold, Some(all_boot));
            }
        }
    }
}
