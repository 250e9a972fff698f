//! Writes the commented reference file.

/// Comments are wrapped at this width.
const WIDTH: usize = 110;

/// Collects the text of the reference file.
#[derive(Debug, Default)]
pub(super) struct Writer {
    text: String,
}

impl Writer {
    pub(super) fn comment(&mut self, text: &str) {
        let mut line = String::from("#");
        for word in text.split_whitespace() {
            if line.len() + 1 + word.len() > WIDTH {
                self.text.push_str(&line);
                self.text.push('\n');
                line = String::from("#");
            }
            line.push(' ');
            line.push_str(word);
        }
        self.text.push_str(&line);
        self.text.push('\n');
    }

    pub(super) fn section(&mut self, name: &str, about: &[&str]) {
        self.text.push('\n');
        self.comment(&about.concat());
        self.text.push_str(&format!("[{name}]\n"));
    }

    /// Keys stand as `#key = default`, without a space, so that they differ from prose and a new default reaches everyone who never set it.
    pub(super) fn key(&mut self, key: &str, doc: &[&str], value: Option<String>) {
        self.text.push('\n');
        self.comment(&doc.concat());
        if let Some(value) = value {
            self.text.push_str(&format!("#{key} = {value}\n"));
        }
    }

    pub(super) fn raw(&mut self, text: &str) {
        self.text.push_str(text);
    }

    pub(super) fn finish(self) -> String {
        self.text
    }
}
