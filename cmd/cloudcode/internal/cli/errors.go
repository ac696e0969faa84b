package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
)

// Exit codes. They are part of the interface (see exitCodesHelp): never change one.
const (
	exitError       = 1
	exitUsage       = 2
	exitUnavailable = 3
	exitNotFound    = 4
	exitDenied      = 5
	exitConflict    = 6
	exitFailed      = 7
	exitTimeout     = 8
	exitInterrupted = 130
)

const exitCodesHelp = `Exit codes:
  0    it worked
  1    an error that is none of the following
  2    wrong usage, or the server refused an argument
  3    the server (or the container runtime) cannot be reached
  4    not found
  5    not signed in, or not allowed
  6    conflict: it exists already, was changed meanwhile, or its state does not allow it
  7    the session failed while the command waited for it
  8    time ran out
  130  interrupted`

// Error is what a command ends with: what failed and what to do.
type Error struct {
	Code   string // as in gRPC, UPPER_SNAKE_CASE
	Reason string // more exact than Code, UPPER_SNAKE_CASE; may be empty
	Msg    string // one line
	Hint   string // what to do, one line; may be empty
	Exit   int
	Err    error // the cause, may be nil
}

func (e *Error) Error() string { return e.Msg }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// usageError marks errors in how a command was called.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// explain turns any error into one for people. It is idempotent.
func explain(err error) *Error {
	var known *Error
	if errors.As(err, &known) {
		if known.Exit == 0 {
			known.Exit = exitError
		}
		return known
	}
	var usage usageError
	if errors.As(err, &usage) {
		return &Error{Code: "INVALID_ARGUMENT", Reason: "USAGE", Msg: oneLine(err.Error()), Exit: exitUsage, Err: err}
	}
	if errors.Is(err, context.Canceled) {
		return &Error{Code: "CANCELLED", Msg: "interrupted", Exit: exitInterrupted, Err: err}
	}
	if st, ok := status.FromError(err); ok {
		return explainStatus(st, err)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return &Error{Code: "DEADLINE_EXCEEDED", Msg: "time ran out: " + oneLine(err.Error()), Exit: exitTimeout, Err: err}
	}
	return &Error{Code: "UNKNOWN", Msg: oneLine(err.Error()), Exit: exitError, Err: err}
}

// codeName is the name as the API's documentation has it.
func codeName(c codes.Code) string {
	switch c {
	case codes.OK:
		return "OK"
	case codes.Canceled:
		return "CANCELLED"
	case codes.InvalidArgument:
		return "INVALID_ARGUMENT"
	case codes.DeadlineExceeded:
		return "DEADLINE_EXCEEDED"
	case codes.NotFound:
		return "NOT_FOUND"
	case codes.AlreadyExists:
		return "ALREADY_EXISTS"
	case codes.PermissionDenied:
		return "PERMISSION_DENIED"
	case codes.ResourceExhausted:
		return "RESOURCE_EXHAUSTED"
	case codes.FailedPrecondition:
		return "FAILED_PRECONDITION"
	case codes.Aborted:
		return "ABORTED"
	case codes.OutOfRange:
		return "OUT_OF_RANGE"
	case codes.Unimplemented:
		return "UNIMPLEMENTED"
	case codes.Internal:
		return "INTERNAL"
	case codes.Unavailable:
		return "UNAVAILABLE"
	case codes.DataLoss:
		return "DATA_LOSS"
	case codes.Unauthenticated:
		return "UNAUTHENTICATED"
	default:
		return "UNKNOWN"
	}
}

// explainStatus explains an error of an API call by its code and reason. What
// has to do with how the server was reached is in client.explain.
func explainStatus(st *status.Status, err error) *Error {
	e := &Error{Code: codeName(st.Code()), Reason: grpcerr.Reason(err), Msg: oneLine(st.Message()), Exit: exitError, Err: err}
	// Field violations say which argument; the message often does not.
	for _, d := range st.Details() {
		if bad, ok := d.(*errdetails.BadRequest); ok {
			for _, v := range bad.GetFieldViolations() {
				if text := v.GetField() + ": " + v.GetDescription(); !strings.Contains(e.Msg, v.GetDescription()) {
					e.Msg += "; " + oneLine(text)
				}
			}
		}
	}
	if e.Msg == "" {
		e.Msg = "the server answered " + e.Code + " without a text"
	}
	switch st.Code() {
	case codes.Canceled:
		e.Msg, e.Exit = "interrupted", exitInterrupted
	case codes.InvalidArgument, codes.OutOfRange:
		e.Exit = exitUsage
	case codes.NotFound:
		e.Exit = exitNotFound
	case codes.Unauthenticated, codes.PermissionDenied:
		e.Exit = exitDenied
	case codes.AlreadyExists, codes.Aborted, codes.FailedPrecondition:
		e.Exit = exitConflict
	case codes.Unavailable:
		e.Exit = exitUnavailable
	case codes.DeadlineExceeded:
		e.Exit = exitTimeout
		e.Hint = "the server did not answer in time; try again, or allow more with --request-timeout"
	case codes.Unimplemented:
		e.Hint = "the server is older than this program; upgrade it"
	case codes.ResourceExhausted:
		e.Hint = "free some space or raise the limit, then try again"
	case codes.Internal, codes.Unknown, codes.DataLoss:
		e.Hint = "this is a fault of the server: see its log"
	}
	if hint := reasonHints[e.Reason]; hint != "" {
		e.Hint = hint
	}
	return e
}

// tlsHint says what to do about a failed handshake.
func tlsHint(err error, server string) (msg, hint string, ok bool) {
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	var record tls.RecordHeaderError
	switch {
	case errors.As(err, &unknown):
		return server + " has a certificate of an authority that is not known here",
			"copy pki/ca.crt from the server's data directory and name it with --ca-file", true
	case errors.As(err, &host):
		return oneLine(server + " has a certificate for other names: " + host.Error()),
			"name the server as its certificate does, or start it with --advertise and this name", true
	case errors.As(err, &invalid):
		return oneLine(server + " has a certificate that is not valid: " + invalid.Error()),
			"check the clocks of both machines; a server makes a new certificate when it is restarted", true
	case errors.As(err, &record):
		return server + " does not speak TLS", "is this the gateway's address? The command line needs the server's gRPC address, port 7443 by default", true
	}
	return "", "", false
}

// report prints an error: for people as `error: …` with a hint below, for
// programs as one JSON object.
func report(w io.Writer, e *Error, asJSON bool) {
	if asJSON {
		type body struct {
			Code    string `json:"code"`
			Reason  string `json:"reason,omitempty"`
			Message string `json:"message"`
			Hint    string `json:"hint,omitempty"`
		}
		out, err := json.Marshal(struct {
			Error    body `json:"error"`
			ExitCode int  `json:"exitCode"`
		}{body{e.Code, e.Reason, e.Msg, e.Hint}, e.Exit})
		if err == nil {
			fmt.Fprintf(w, "%s\n", out)
			return
		}
	}
	fmt.Fprintf(w, "error: %s\n", e.Msg)
	if e.Hint != "" {
		fmt.Fprintf(w, "  %s\n", e.Hint)
	}
}
