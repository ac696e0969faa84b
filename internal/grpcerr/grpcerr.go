// Package grpcerr makes and reads the errors of our gRPC APIs: a code, a reason
// in google.rpc.ErrorInfo, and a text that says what to do.
package grpcerr

import (
	"fmt"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
)

// Domain of every reason.
const Domain = "cloudcode"

// New returns an error with a code, a reason in UPPER_SNAKE_CASE and a text.
func New(code codes.Code, reason, format string, args ...any) error {
	return WithDetails(code, reason, fmt.Sprintf(format, args...))
}

// WithDetails is New with further details, such as errdetails.BadRequest.
func WithDetails(code codes.Code, reason, message string, details ...protoadapt.MessageV1) error {
	st := status.New(code, message)
	all := append([]protoadapt.MessageV1{&errdetails.ErrorInfo{Reason: reason, Domain: Domain}}, details...)
	if detailed, err := st.WithDetails(all...); err == nil { // fails for codes.OK only
		st = detailed
	}
	return st.Err()
}

// Reason returns the reason of an error made by New, also after it has crossed
// the wire; empty if it has none.
func Reason(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == Domain {
			return info.GetReason()
		}
	}
	return ""
}
