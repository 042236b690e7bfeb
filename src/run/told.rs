//! Told: what `verify` says: lines for people, or JSON (docs/verify.schema.json); and its exit code.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};

use super::Outcome;
use super::out::{self, count};
use super::varlink::path_to_json;
use super::verify::{conclude, summary, verified};
use crate::manifest::Index;
use crate::verify::{Difference, Kind, ProofReport, Told, VerifyReport};

/// How differences and the sum are said.
#[derive(Debug, Clone, Copy)]
pub(super) enum Form {
    /// On standard output.
    Lines,
    /// Likewise, an object on each.
    Json,
    /// Standard output is for something else: only the sum, on standard error.
    Quiet,
}

/// What was said of the differences.
pub(super) struct Said {
    /// What users did since does not count.
    forgives: bool,
    form: Form,
    counts: HashMap<Kind, u64>,
    forgiven: u64,
}

impl Said {
    pub(super) fn new(forgives: bool, form: Form) -> Said {
        Said {
            forgives,
            form,
            counts: HashMap::new(),
            forgiven: 0,
        }
    }

    pub(super) fn tell(&mut self, told: &Told) {
        let Told::Difference(difference) = told else {
            return;
        };
        *self.counts.entry(difference.kind).or_default() += 1;
        let theirs = [Kind::Changed, Kind::Missing, Kind::Extra].contains(&difference.kind);
        if self.forgives && theirs {
            self.forgiven += 1;
            return;
        }
        match self.form {
            Form::Lines => out::say(&difference.to_string()),
            Form::Json => out::say(&as_json(difference).to_string()),
            Form::Quiet => {}
        }
    }

    /// The sum, and the exit code.
    pub(super) fn end(self, compared: ProofReport, proof: Option<&Index>) -> Outcome {
        let mut report = compared.tree;
        let say: fn(&str) = match self.form {
            Form::Lines => out::say,
            Form::Quiet => out::complain,
            Form::Json => |_| {},
        };
        match proof {
            None => say(&summary(&report)),
            Some(manifest) => {
                if !manifest.has_ended() {
                    let line = "the run that wrote the manifest did not end, or some entries failed: \
                                it does not hold all of the tree; the same sync completes it";
                    out::complain(line);
                }
                if compared.without_xattrs > 0 {
                    out::complain(&format!(
                        "the manifest tells no xattrs and ACLs of {} entries: these were not compared",
                        count(compared.without_xattrs)
                    ));
                }
                if compared.xattrs_unseen > 0 {
                    out::complain(&format!(
                        "xattrs of {} entries were not compared: security.* and trusted.* are for root",
                        count(compared.xattrs_unseen)
                    ));
                }
                say(&self.proof_summary(&report));
            }
        }
        let sum = self.sum(&compared, proof);
        report.differences -= self.forgiven;
        let outcome = conclude(&report);
        if matches!(self.form, Form::Json) {
            let exit = outcome.as_ref().map_or_else(|f| f.exit, |code| *code);
            out::say(&json!({ "sum": sum, "exit": exit }).to_string());
        }
        outcome
    }

    /// What was compared, and how many differences of each kind there are, forgiven ones too.
    fn sum(&self, compared: &ProofReport, proof: Option<&Index>) -> Value {
        let VerifyReport {
            entries,
            files,
            bytes,
            stopped,
            elapsed,
            ..
        } = compared.tree;
        let kinds = self.counts.iter().map(|(kind, n)| (word(*kind), *n));
        json!({
            "entries": entries,
            "files": files,
            "bytes": bytes,
            "seconds": elapsed.as_secs_f64(),
            "stopped": stopped,
            "differences": kinds.collect::<BTreeMap<_, _>>(),
            "ignored": self.forgiven,
            "manifest": proof.map(|manifest| json!({
                "ended": manifest.has_ended(),
                "without_xattrs": compared.without_xattrs,
                "xattrs_unseen": compared.xattrs_unseen,
            })),
        })
    }

    fn proof_summary(&self, report: &VerifyReport) -> String {
        let of = |kind| self.counts.get(&kind).copied().unwrap_or(0);
        let mut line = format!("{}: {} corrupt", verified(report), count(of(Kind::Corrupt)));
        for (kind, what) in [
            (Kind::Changed, "changed since"),
            (Kind::Missing, "missing"),
            (Kind::Extra, "extra"),
            (Kind::NotFinished, "not finished"),
            (Kind::Unproven, "without a digest"),
            (Kind::Unreadable, "unreadable"),
        ] {
            let basic = [Kind::Changed, Kind::Missing, Kind::Extra].contains(&kind);
            if basic || of(kind) > 0 {
                line += &format!(", {} {what}", count(of(kind)));
            }
        }
        line
    }
}

/// As the schema has it.
fn as_json(difference: &Difference) -> Value {
    let mut line = path_to_json(&difference.path);
    line["kind"] = json!(word(difference.kind));
    line["detail"] = json!(difference.detail);
    line
}

/// The name of a kind: one word.
fn word(kind: Kind) -> String {
    kind.to_string().replace(' ', "_")
}
