//! Request targets: paths with percent-encoded segments and queries.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

/// RFC 3986's unreserved characters need no encoding; neither does `/` in a query.
const IN_SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
const IN_QUERY: &AsciiSet = &IN_SEGMENT.remove(b'/').remove(b':');
/// The servers' ceiling (and that of the `http` crate).
pub(crate) const TARGET_BYTES_MAX: usize = 65_534;

/// A path and query under construction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    text: String,
    has_query: bool,
}

impl Target {
    /// `/v1/sprites`
    pub(crate) fn sprites() -> Self {
        Self { text: "/v1/sprites".to_owned(), has_query: false }
    }

    /// `/v1/sprites/{name}`
    pub(crate) fn sprite(name: &str) -> Self {
        Self::sprites().then(name)
    }

    /// As the user wrote it, leading `/` included.
    pub(crate) fn verbatim(text: &str) -> Self {
        Self { text: text.to_owned(), has_query: text.contains('?') }
    }

    #[must_use]
    pub(crate) fn then(mut self, segment: &str) -> Self {
        self.text.push('/');
        // A segment of dots would be taken for navigation.
        if segment == "." || segment == ".." {
            self.text.push_str(&segment.replace('.', "%2E"));
        } else {
            self.text.extend(utf8_percent_encode(segment, IN_SEGMENT));
        }
        self
    }

    #[must_use]
    pub(crate) fn with(mut self, key: &str, value: &str) -> Self {
        self.text.push(if self.has_query { '&' } else { '?' });
        self.has_query = true;
        self.text.push_str(key);
        self.text.push('=');
        self.text.extend(utf8_percent_encode(value, IN_QUERY));
        self
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_a_user_says_stays_in_its_place() {
        let target = Target::sprite("a/b?c").then("exec").with("cmd", "a b&c=d+é").with("dir", "/tmp");
        assert_eq!(target.as_str(), "/v1/sprites/a%2Fb%3Fc/exec?cmd=a%20b%26c%3Dd%2B%C3%A9&dir=/tmp");
        assert_eq!(Target::sprite("..").as_str(), "/v1/sprites/%2E%2E");
        assert_eq!(Target::verbatim("/v1/x?a=1").with("b", "2").as_str(), "/v1/x?a=1&b=2");
    }
}
