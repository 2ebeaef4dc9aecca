//! `tokenizer.model`: the pieces of a SentencePiece vocabulary, read from its protobuf (sentencepiece_model.proto).
//!
//! ```text
//! ModelProto    { repeated SentencePiece pieces = 1; … }
//! SentencePiece { string piece = 1; float score = 2; Type type = 3; }
//! ```

/// A piece of the vocabulary.
#[derive(Debug, PartialEq)]
pub struct Piece {
    /// Its text.
    pub text: String,
    /// Its score, a log probability.
    pub score: f32,
    /// What it is: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
    pub kind: u64,
}

/// A value of a message.
enum Value<'a> {
    Varint(u64),
    Fixed32([u8; 4]),
    Bytes(&'a [u8]),
    Fixed64,
}

/// Reads a message field by field.
struct Message<'a>(&'a [u8]);

impl<'a> Message<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, n: u64) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(usize::try_from(n).ok()?)?;
        self.0 = rest;
        Some(bytes)
    }

    /// The next field's number and value; `None` where the message is cut short or has wire types of no use here.
    fn field(&mut self) -> Option<(u64, Value<'a>)> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => self.take(8).map(|_| Value::Fixed64)?,
            2 => {
                let n = self.varint()?;
                Value::Bytes(self.take(n)?)
            }
            5 => Value::Fixed32(*self.take(4)?.first_chunk()?),
            _ => return None,
        };
        Some((tag >> 3, value))
    }
}

/// The pieces in the order of their ids, `most` at most.
pub fn pieces(model: &[u8], most: usize) -> Result<Vec<Piece>, String> {
    let (mut message, mut pieces) = (Message(model), Vec::new());
    while !message.0.is_empty() {
        let at = model.len() - message.0.len();
        let broken = || format!("byte {at}: no field of a SentencePiece model");
        if let (1, Value::Bytes(bytes)) = message.field().ok_or_else(broken)? {
            if pieces.len() == most {
                return Err(format!("more than {most} pieces"));
            }
            pieces.push(piece(bytes).ok_or_else(|| format!("byte {at}: piece {} is broken", pieces.len()))?);
        }
    }
    match pieces.is_empty() {
        true => Err("no pieces".to_string()),
        false => Ok(pieces),
    }
}

fn piece(bytes: &[u8]) -> Option<Piece> {
    let (mut message, mut piece) = (Message(bytes), Piece { text: String::new(), score: 0.0, kind: 1 });
    while !message.0.is_empty() {
        match message.field()? {
            (1, Value::Bytes(text)) => piece.text = std::str::from_utf8(text).ok()?.to_string(),
            (2, Value::Fixed32(score)) => piece.score = f32::from_le_bytes(score),
            (3, Value::Varint(kind)) => piece.kind = kind,
            _ => {}
        }
    }
    Some(piece)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_read_and_broken_files_refused() {
        // Two pieces, the second with a score and a type, and a field of another number.
        let good = b"\x0a\x05\x0a\x03\xe2\x96\x81\x0a\x0b\x0a\x02ab\x15\x00\x00\x00\xc0\x18\x06\x12\x01x";
        let want = [Piece { text: "▁".into(), score: 0.0, kind: 1 }, Piece { text: "ab".into(), score: -2.0, kind: 6 }];
        assert_eq!(pieces(good, 2).unwrap(), want);
        let cases: &[(&[u8], &str)] = &[
            (b"", "no pieces"),
            (b"\x12\x01x", "no pieces"),
            (&good[..9], "byte 7: no field"),
            (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "byte 0: no field"),
            (b"\x0a\x03\x0a\x01\xff", "byte 0: piece 0 is broken"),
            (b"\x0b", "byte 0: no field"),
            (b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80", "byte 0: no field"),
        ];
        for (bytes, want) in cases {
            let said = pieces(bytes, 2).unwrap_err();
            assert!(said.starts_with(want), "{bytes:?}: {said}");
        }
        assert!(pieces(good, 1).unwrap_err().starts_with("more than 1"));
    }
}
