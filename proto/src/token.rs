//! API tokens as text, `org-slug/org-id/token-id/token-value`, and how a request carries one. Whether a token is valid only a coordinator knows.

use uuid::Uuid;

/// A longer text is not a token.
const TOKEN_BYTES_MAX: usize = 512;

/// A text that has the form of a token, taken apart.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TokenParts<'a> {
    pub org: &'a str,
    pub org_id: Uuid,
    /// A uuid of hexadecimal digits only, so it may be part of a key.
    pub token_id: &'a str,
    pub value: &'a str,
}

impl<'a> TokenParts<'a> {
    /// `None` when the text does not have the form.
    pub fn parse(token: &'a str) -> Option<Self> {
        if token.len() > TOKEN_BYTES_MAX {
            return None;
        }
        let mut parts = token.split('/');
        let (org, org_id, token_id, value) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let org_id = Uuid::parse_str(org_id).ok()?;
        let is_whole = parts.next().is_none() && is_slug(org) && !value.is_empty();
        let is_plain_id = Uuid::parse_str(token_id).is_ok_and(|id| id.simple().to_string() == token_id);
        (is_whole && is_plain_id).then_some(Self { org, org_id, token_id, value })
    }
}

/// Whether the text can name an organisation: 1 to 63 lower-case letters, digits and hyphens.
pub fn is_slug(text: &str) -> bool {
    (1..=63).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// The token of a request with these `Authorization` headers. Several are none: whom should we believe?
pub fn bearer<'a>(mut authorizations: impl Iterator<Item = &'a [u8]>) -> Option<&'a str> {
    let value = std::str::from_utf8(authorizations.next()?).ok()?;
    if authorizations.next().is_some() {
        return None;
    }
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

/// Whether an `Authorization` header has a text of a token's form in it, whoever owns it and whatever the scheme.
pub fn is_in(authorization: &[u8]) -> bool {
    let text = String::from_utf8_lossy(authorization);
    text.split(|c: char| c.is_whitespace() || c == ',').any(|word| TokenParts::parse(word).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "local/0190a6d2f1c87b3e9d4f5a6b7c8d9e0f/0190a6d2f1c87b3e9d4f5a6b7c8d9e10/secret";

    #[test]
    fn a_token_is_read_from_exactly_one_bearer_header() {
        let check = |values: &[&str], expected| {
            assert_eq!(bearer(values.iter().map(|value| value.as_bytes())), expected, "{values:?}");
        };
        check(&["Bearer org/oid/id/secret"], Some("org/oid/id/secret"));
        check(&["bearer  t "], Some("t"));
        check(&["Basic eDp5"], None);
        check(&["Bearer "], None);
        check(&["Bearer"], None);
        check(&["Bearer a", "Bearer b"], None);
        check(&[], None);
    }

    #[test]
    fn a_token_is_known_by_its_form() {
        for with in
            [format!("Bearer {TOKEN}"), format!("bearer  {TOKEN} "), TOKEN.to_owned(), format!("Token a,{TOKEN}")]
        {
            assert!(is_in(with.as_bytes()), "{with}");
        }
        let other = TOKEN.replace("local", "Not A Slug");
        for without in ["", "Bearer", "Basic eDp5", "Bearer a/b/c/d", "Bearer ///", &format!("{TOKEN}/x"), &other] {
            assert!(!is_in(without.as_bytes()), "{without}");
        }
        assert!(!is_in(b"Bearer \xff\xfe"));
    }
}
