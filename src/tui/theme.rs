//! Colours: for dark terminals, for light ones, and none at all.
//!
//! Only the 256 indexed colours are used, which pass through ssh and tmux everywhere. Without colour, weight and slant
//! say what colour says otherwise.

use ratatui::style::{Color, Modifier, Style};

/// Which colours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scheme {
    /// Light letters on a dark ground.
    Dark,
    /// Dark letters on a light ground.
    Light,
    /// Bold, italic, dim and reverse only.
    None,
}

impl Scheme {
    /// All, in the order in which a key walks through them.
    pub const ALL: [Scheme; 3] = [Scheme::Dark, Scheme::Light, Scheme::None];

    /// The name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Scheme::Dark => "dark",
            Scheme::Light => "light",
            Scheme::None => "none",
        }
    }

    /// A scheme by its name.
    pub fn named(name: &str) -> Option<Scheme> {
        Scheme::ALL.into_iter().find(|s| s.name() == name)
    }

    /// What the environment asks for: none with `NO_COLOR` or on a terminal that has no colours, light where `COLORFGBG`
    /// says that the ground is, else dark.
    pub fn detect(var: impl Fn(&str) -> Option<String>) -> Scheme {
        let set = |name: &str| var(name).is_some_and(|v| !v.is_empty());
        if set("NO_COLOR") || var("TERM").is_some_and(|t| t == "dumb" || t.starts_with("vt1")) {
            return Scheme::None;
        }
        let ground = var("COLORFGBG").and_then(|v| v.rsplit(';').next().and_then(|g| g.parse::<u8>().ok()));
        match ground {
            Some(7 | 9..=15) => Scheme::Light,
            _ => Scheme::Dark,
        }
    }
}

/// The style of everything that is drawn.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Theme {
    /// The scheme that it is of.
    pub scheme: Scheme,
    /// Ordinary text.
    pub text: Style,
    /// What matters less.
    pub dim: Style,
    /// Rules and frames.
    pub rule: Style,
    /// What the eye shall find: the person's mark, a chosen line's mark.
    pub accent: Style,
    /// A chosen line.
    pub selected: Style,
    /// Headings.
    pub heading: Style,
    /// Inline code and formulas.
    pub code: Style,
    /// Links.
    pub link: Style,
    /// Quotations and thoughts.
    pub quote: Style,
    /// Words of a programming language.
    pub keyword: Style,
    /// Strings.
    pub string: Style,
    /// Numbers and constants.
    pub number: Style,
    /// Comments.
    pub comment: Style,
    /// Names of types.
    pub kind: Style,
    /// Going well.
    pub good: Style,
    /// To be noticed.
    pub warn: Style,
    /// Gone wrong.
    pub bad: Style,
    /// What a search found.
    pub found: Style,
}

impl Theme {
    /// The styles of a scheme.
    pub fn new(scheme: Scheme) -> Theme {
        let plain = Style::new();
        if scheme == Scheme::None {
            let (bold, dim, italic) = (plain.bold(), plain.dim(), plain.italic());
            return Theme {
                scheme,
                text: plain,
                dim,
                rule: dim,
                accent: bold,
                selected: plain.reversed(),
                heading: bold.underlined(),
                code: bold,
                link: plain.underlined(),
                quote: italic,
                keyword: bold,
                string: plain,
                number: plain,
                comment: italic,
                kind: plain,
                good: bold,
                warn: bold,
                bad: bold.reversed(),
                found: plain.reversed(),
            };
        }
        let dark = scheme == Scheme::Dark;
        let pick = |on_dark: u8, on_light: u8| plain.fg(Color::Indexed(if dark { on_dark } else { on_light }));
        let ground = |on_dark: u8, on_light: u8| plain.bg(Color::Indexed(if dark { on_dark } else { on_light }));
        Theme {
            scheme,
            text: plain,
            dim: pick(245, 242),
            rule: pick(239, 250),
            accent: pick(215, 130).add_modifier(Modifier::BOLD),
            selected: ground(237, 254),
            heading: pick(117, 25).add_modifier(Modifier::BOLD),
            code: pick(180, 94),
            link: pick(110, 26).add_modifier(Modifier::UNDERLINED),
            quote: pick(250, 240).add_modifier(Modifier::ITALIC),
            keyword: pick(176, 90),
            string: pick(114, 28),
            number: pick(209, 130),
            comment: pick(243, 244).add_modifier(Modifier::ITALIC),
            kind: pick(80, 30),
            good: pick(114, 28),
            warn: pick(221, 136),
            bad: pick(203, 160),
            found: plain.fg(Color::Indexed(16)).bg(Color::Indexed(221)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_chooses() {
        let cases: &[(&[(&str, &str)], Scheme)] = &[
            (&[], Scheme::Dark),
            (&[("NO_COLOR", "1")], Scheme::None),
            (&[("NO_COLOR", "")], Scheme::Dark),
            (&[("TERM", "dumb")], Scheme::None),
            (&[("TERM", "vt100")], Scheme::None),
            (&[("TERM", "xterm-256color"), ("COLORFGBG", "0;15")], Scheme::Light),
            (&[("COLORFGBG", "15;default;0")], Scheme::Dark),
            (&[("COLORFGBG", "nonsense")], Scheme::Dark),
        ];
        for (vars, want) in cases {
            let got = Scheme::detect(|name| vars.iter().find(|v| v.0 == name).map(|v| v.1.to_string()));
            assert_eq!(got, *want, "{vars:?}");
        }
    }

    #[test]
    fn the_configuration_knows_the_names() {
        assert_eq!(Scheme::ALL.map(Scheme::name), crate::config::THEMES);
    }

    #[test]
    fn no_colour_is_no_colour() {
        let t = Theme::new(Scheme::None);
        for s in [t.text, t.dim, t.rule, t.accent, t.selected, t.heading, t.code, t.link, t.keyword, t.bad, t.found] {
            assert!(s.fg.is_none() && s.bg.is_none());
        }
    }
}
