package objstore

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"syscall"

	"github.com/minio/minio-go/v7"
)

// retryable says what a failure allows.
type retryable int

const (
	never        retryable = iota
	always                 // nothing was done
	ifIdempotent           // it may have been done
)

// failure is what became of an error of minio's.
type failure struct {
	err    error
	retry  retryable
	region string // where the bucket is, if the server said so
}

func code(err error) string {
	var r minio.ErrorResponse
	if errors.As(err, &r) {
		return r.Code
	}
	return ""
}

// expectedRegion finds the region in the message of servers that tell it only there.
var expectedRegion = regexp.MustCompile(`expecting '([a-zA-Z0-9-]+)'`)

// classify puts an error into its class, with words for whoever set up the store.
func (s *s3) classify(op, key string, err error) failure {
	if err == nil {
		return failure{}
	}
	what := op
	if key != "" {
		what += " " + key
	}
	say := func(class error, format string, args ...any) error {
		return fmt.Errorf("%w: %s (%s)", class, fmt.Sprintf(format, args...), what)
	}
	var r minio.ErrorResponse
	if !errors.As(err, &r) {
		return s.classifyTransport(what, err)
	}
	at := s.cfg.Endpoint
	switch r.Code {
	case minio.NoSuchKey, "NotFound", "NoSuchVersion":
		return failure{err: fmt.Errorf("%w: %s", ErrNotFound, key)}
	case minio.PreconditionFailed, "NotModified":
		return failure{err: fmt.Errorf("%w: %s: %s", ErrPrecondition, key, r.Error())}
	case "ConditionalRequestConflict", "OperationAborted", minio.Conflict:
		// Another conditional request to this key is under way: this one was not done.
		return failure{err: say(ErrUnavailable, "%s is busy with another write of the same object: %s", at, r.Error()), retry: always}
	case minio.NoSuchBucket, minio.InvalidBucketName:
		return failure{err: say(ErrNoBucket, "there is no bucket %q at %s: create it, or correct its name", s.cfg.Bucket, at)}
	case minio.InvalidAccessKeyID, "InvalidAccessKey", "InvalidClientTokenId",
		"XAdminUserNotFound": // versitygw
		return failure{err: say(ErrDenied, "%s does not know access key id %s: check it", at, s.shownKey())}
	case minio.SignatureDoesNotMatch, "InvalidSignature":
		return failure{err: say(ErrDenied, "the secret access key is not the one of access key id %s: check it", s.shownKey())}
	case minio.RequestTimeTooSkewed, "RequestExpired":
		return failure{err: say(ErrDenied, "this machine's clock is not that of %s: set it right", at)}
	case "ExpiredToken", "InvalidToken", "TokenRefreshRequired":
		return failure{err: say(ErrDenied, "access key id %s has expired or was revoked: make a new one", s.shownKey())}
	case minio.InvalidRegion, minio.AuthorizationHeaderMalformed, "PermanentRedirect", "TemporaryRedirect", "Redirect",
		"IncorrectEndpoint", "IllegalLocationConstraintException", "AuthorizationQueryParametersError":
		region := r.Region
		if m := expectedRegion.FindStringSubmatch(r.Message); region == "" && m != nil {
			region = m[1]
		}
		switch {
		case region != "" && region != s.cfg.Region:
			return failure{err: say(ErrRegion, "bucket %q is in region %q: set that, or auto", s.cfg.Bucket, region), region: region}
		case strings.Contains(strings.ToLower(r.Message), "region") || r.Code != minio.AuthorizationHeaderMalformed:
			return failure{err: say(ErrRegion, "%s does not take region %q for bucket %q: %s", at, s.cfg.Region, s.cfg.Bucket, r.Error())}
		}
		return failure{err: say(ErrDenied, "%s cannot read the access key id %s: %s", at, s.shownKey(), r.Error())}
	case minio.NotImplemented, minio.APINotSupported, minio.MethodNotAllowed:
		return failure{err: say(ErrUnsupported, "%s: %s", at, r.Error())}
	case "SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException", "TooManyRequests",
		"RequestLimitExceeded", "RequestThrottled":
		return failure{err: say(ErrUnavailable, "%s asks to slow down", at), retry: always}
	case minio.XAmzContentSHA256Mismatch, minio.BadDigest, minio.IncompleteBody, "RequestTimeout":
		// Damaged or cut off on its way, and so not stored.
		return failure{err: say(ErrUnavailable, "%s: %s", at, r.Error()), retry: always}
	}
	switch st := r.StatusCode; {
	case st == http.StatusForbidden || st == http.StatusUnauthorized || r.Code == minio.AccessDenied || r.Code == minio.AllAccessDisabled:
		f := failure{err: say(ErrDenied, "access key id %s may not do this in bucket %q at %s, or is wrong: %s", s.shownKey(), s.cfg.Bucket, at, r.Error())}
		if r.Region != "" && r.Region != s.cfg.Region {
			f.region = r.Region
		}
		return f
	case st == http.StatusPreconditionFailed:
		return failure{err: fmt.Errorf("%w: %s", ErrPrecondition, key)}
	case st == http.StatusNotImplemented:
		return failure{err: say(ErrUnsupported, "%s: %s", at, r.Error())}
	case st == http.StatusTooManyRequests:
		return failure{err: say(ErrUnavailable, "%s asks to slow down", at), retry: always}
	case st >= 500 || st == http.StatusRequestTimeout || st == 0:
		return failure{err: say(ErrUnavailable, "%s answers %s", at, status(r)), retry: ifIdempotent}
	case st/100 == 3:
		return failure{err: say(ErrRegion, "%s sends one elsewhere for bucket %q: use the bucket's own endpoint and region", at, s.cfg.Bucket), region: r.Region}
	}
	return failure{err: say(ErrUnsupported, "%s answers %s", at, status(r))}
}

// status is all that an answer says, on one line.
func status(r minio.ErrorResponse) string {
	s := r.Code
	if r.StatusCode != 0 && !strings.HasPrefix(s, fmt.Sprint(r.StatusCode)) {
		s = fmt.Sprintf("%d %s", r.StatusCode, s)
	}
	if text := strings.Join(strings.Fields(r.Error()), " "); text != s {
		s += ": " + text
	}
	const enough = 200
	if len(s) > enough {
		s = s[:enough] + "…"
	}
	return s
}

// shownKey is enough of the access key id to recognise it: someone may have put the secret there.
func (s *s3) shownKey() string {
	const shown = 8
	if id := s.cfg.AccessKeyID; len(id) <= shown {
		return id
	}
	return s.cfg.AccessKeyID[:shown] + "…"
}

// classifyTransport is for what is no answer of an S3 server.
func (s *s3) classifyTransport(what string, err error) failure {
	at := s.cfg.Endpoint
	say := func(class error, format string, args ...any) error {
		return fmt.Errorf("%w: %s (%s)", class, fmt.Sprintf(format, args...), what)
	}
	var (
		foreign  *notS3Error
		dns      *net.DNSError
		unknown  x509.UnknownAuthorityError
		hostname x509.HostnameError
		invalid  x509.CertificateInvalidError
		record   tls.RecordHeaderError
		verify   *tls.CertificateVerificationError
		op       *net.OpError
		netErr   net.Error
	)
	switch {
	case errors.As(err, &foreign):
		return failure{err: say(ErrUnsupported, "%s: %v", at, foreign)}
	case errors.As(err, &dns):
		hint := ""
		if !s.cfg.UsesPathStyle() {
			hint = ", or use path style if the server has no host name for each bucket"
		}
		if dns.IsNotFound {
			return failure{err: say(ErrUnavailable, "there is no host %s: check the endpoint%s", dns.Name, hint)}
		}
		return failure{err: say(ErrUnavailable, "the name %s cannot be looked up now: %s", dns.Name, dns.Err), retry: always}
	case errors.As(err, &unknown):
		return failure{err: say(ErrUnavailable, "the certificate of %s is signed by nobody this machine trusts: add its CA to the system's certificates", at)}
	case errors.As(err, &hostname):
		return failure{err: say(ErrUnavailable, "the certificate of %s is for another name: %v", at, hostname)}
	case errors.As(err, &invalid), errors.As(err, &verify):
		return failure{err: say(ErrUnavailable, "the certificate of %s is not valid: %v", at, inner(err))}
	case errors.As(err, &record), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return failure{err: say(ErrUnavailable, "%s does not speak TLS: it may want http:// and not https://", at)}
	case errors.Is(err, errAnswer):
		return failure{err: say(ErrTooLarge, "%s: %v", at, errAnswer)}
	case errors.Is(err, errStalled):
		return failure{err: say(ErrUnavailable, "%s stopped in the middle of an answer", at), retry: ifIdempotent}
	case errors.Is(err, syscall.ECONNREFUSED):
		return failure{err: say(ErrUnavailable, "%s refuses connections: is it running, and the port right?", at), retry: always}
	case errors.As(err, &op) && op.Op == "dial":
		if op.Timeout() {
			return failure{err: say(ErrUnavailable, "%s does not answer within %v", at, s.cfg.Timeouts.Dial), retry: always}
		}
		return failure{err: say(ErrUnavailable, "no connection to %s: %v", at, op.Err), retry: always}
	case errors.As(err, &netErr) && netErr.Timeout(), errors.Is(err, context.DeadlineExceeded):
		return failure{err: say(ErrUnavailable, "%s takes too long to answer", at), retry: ifIdempotent}
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return failure{err: say(ErrUnavailable, "%s broke the connection off", at), retry: ifIdempotent}
	case errors.Is(err, io.ErrUnexpectedEOF):
		return failure{err: say(ErrUnavailable, "%s cut an answer off", at), retry: ifIdempotent}
	}
	if strings.Contains(err.Error(), "Connection closed by foreign host") { // minio's words for EOF
		return failure{err: say(ErrUnavailable, "%s closed the connection without an answer", at), retry: ifIdempotent}
	}
	return failure{err: say(ErrUnavailable, "%s: %v", at, inner(err)), retry: ifIdempotent}
}

// inner is an error without the address of the request, which is long and says nothing new.
func inner(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}
