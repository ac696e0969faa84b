package storage

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"

	"github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	conf "github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

// Reasons of errors. They are part of the API: never rename one.
const (
	ReasonIncomplete    = "STORAGE_INCOMPLETE"
	ReasonDenied        = "STORAGE_DENIED"
	ReasonNoBucket      = "STORAGE_NO_BUCKET"
	ReasonWrongRegion   = "STORAGE_WRONG_REGION"
	ReasonUnreachable   = "STORAGE_UNREACHABLE"
	ReasonUnsupported   = "STORAGE_UNSUPPORTED"
	ReasonPrefixInUse   = "STORAGE_PREFIX_IN_USE"
	ReasonNotConfigured = "STORAGE_NOT_CONFIGURED"
	ReasonWrongKey      = "WRONG_ENCRYPTION_KEY"
	ReasonOtherMode     = "STORAGE_OTHER_MODE"
	ReasonTaken         = "STORAGE_TAKEN"
	ReasonLocal         = "STORAGE_LOCAL"
	ReasonNoProfile     = "STORAGE_PROFILE_NOT_FOUND"
	ReasonNotAllowed    = "STORAGE_ENDPOINT_NOT_ALLOWED"
	ReasonNoCheckpoint  = "CHECKPOINT_NOT_FOUND"
	ReasonDamaged       = "CHECKPOINT_DAMAGED"
)

// classes turns what an object store or a repository says into what the API says.
var classes = []struct {
	err    error
	code   codes.Code
	reason string
}{
	{conf.ErrInvalid, codes.InvalidArgument, ReasonIncomplete},
	{objstore.ErrDenied, codes.FailedPrecondition, ReasonDenied},
	{objstore.ErrNoBucket, codes.FailedPrecondition, ReasonNoBucket},
	{objstore.ErrRegion, codes.FailedPrecondition, ReasonWrongRegion},
	{objstore.ErrUnsupported, codes.FailedPrecondition, ReasonUnsupported},
	{objstore.ErrNotAllowed, codes.FailedPrecondition, ReasonNotAllowed},
	{objstore.ErrUnavailable, codes.Unavailable, ReasonUnreachable},
	{checkpoint.ErrNotFound, codes.NotFound, ReasonNoCheckpoint},
	{checkpoint.ErrDamaged, codes.FailedPrecondition, ReasonDamaged},
	{checkpoint.ErrKey, codes.FailedPrecondition, ReasonWrongKey},
	{checkpoint.ErrExists, codes.FailedPrecondition, ReasonPrefixInUse},
	{checkpoint.ErrFenced, codes.FailedPrecondition, ReasonTaken},
}

// words names the object store that an error is of. What is of no class, such as
// the end of the caller's context, stays as it is.
func words(c conf.Config, err error) error {
	if err == nil || grpcerr.Reason(err) != "" || errors.Is(err, context.Canceled) || errors.Is(err, fleet.ErrUnavailable) {
		return err
	}
	for _, class := range classes {
		if errors.Is(err, class.err) {
			return grpcerr.New(class.code, class.reason, "object storage %s: %s", c, err.Error())
		}
	}
	return err
}
