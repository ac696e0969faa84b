package api

import (
	"context"
	"errors"
	"log/slog"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

// Reasons of errors. They are part of the API: never rename one.
const (
	reasonInvalid         = "INVALID_FIELDS"
	reasonSessionNotFound = "SESSION_NOT_FOUND"
	reasonNodeNotFound    = "NODE_NOT_FOUND"
	reasonSessionExists   = "SESSION_EXISTS"
	reasonRequestReused   = "REQUEST_ID_REUSED"
	reasonRequestSpent    = "REQUEST_ID_SPENT"
	reasonEtag            = "ETAG_MISMATCH"
	reasonDeleting        = "SESSION_DELETING"
	reasonNotPlaced       = "SESSION_NOT_PLACED"
	reasonNoLogs          = "SESSION_NOT_STARTED"
	reasonUnreachable     = "NODE_UNREACHABLE"
	reasonLost            = "SESSION_LOST"
	reasonNotRunning      = "SESSION_NOT_RUNNING"
	reasonMount           = "STORAGE_MOUNT"
	reasonNoPath          = "FILE_NOT_FOUND"
)

// classes maps the error classes of fleet; the only place that does.
var classes = []struct {
	err    error
	code   codes.Code
	reason string
}{
	{fleet.ErrNotFound, codes.NotFound, "NOT_FOUND"},
	{fleet.ErrAlreadyExists, codes.AlreadyExists, "ALREADY_EXISTS"},
	{fleet.ErrInvalidArgument, codes.InvalidArgument, "INVALID_ARGUMENT"},
	{fleet.ErrFailedPrecondition, codes.FailedPrecondition, "FAILED_PRECONDITION"},
	{fleet.ErrAborted, codes.Aborted, "ABORTED"},
	{fleet.ErrStale, codes.FailedPrecondition, "STALE"},
	{fleet.ErrUnavailable, codes.Unavailable, "UNAVAILABLE"},
	{fleet.ErrResourceExhausted, codes.ResourceExhausted, "OUT_OF_SPACE"},
}

// Status turns an error into one with a gRPC status; one that has it stays as it
// is. What is of no class is INTERNAL, and its text goes to the log and not to
// the caller.
func Status(ctx context.Context, log *slog.Logger, err error) error {
	if err == nil {
		return nil
	}
	// Only an error that is itself a status: one that is wrapped is of some inner
	// call, and its code means nothing to our caller.
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok { //nolint:errorlint // see above
		return err
	}
	for _, c := range classes {
		if errors.Is(err, c.err) {
			return grpcerr.New(c.code, c.reason, "%s", err.Error())
		}
	}
	switch {
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, "the caller went away")
	case errors.Is(err, context.DeadlineExceeded):
		return grpcerr.New(codes.DeadlineExceeded, "DEADLINE_EXCEEDED", "not done within the time that the caller allowed")
	}
	log.ErrorContext(ctx, "internal error", "error", err)
	return grpcerr.New(codes.Internal, "INTERNAL", "internal error: the server's log says more")
}

// violations collects everything that is wrong with a request.
type violations []*errdetails.BadRequest_FieldViolation

func (v *violations) add(field, description string) {
	*v = append(*v, &errdetails.BadRequest_FieldViolation{Field: field, Description: description})
}

// err returns INVALID_ARGUMENT that names all violations, or nil.
func (v violations) err() error {
	if len(v) == 0 {
		return nil
	}
	text := ""
	for i, f := range v {
		if i > 0 {
			text += "; "
		}
		text += f.GetField() + ": " + f.GetDescription()
	}
	return grpcerr.WithDetails(codes.InvalidArgument, reasonInvalid, text, &errdetails.BadRequest{FieldViolations: v})
}

func sessionNotFound(id string) error {
	return grpcerr.New(codes.NotFound, reasonSessionNotFound, "there is no session %q: `cloudcode session list` shows those that are", id)
}
