package nodev1

import (
	"fmt"
	"log/slog"
	"strconv"
)

// The keys of object stores are in these messages. Their String tells all; logs and
// fmt, which are how such things get out by accident, are told which they are.

// LogValue implements slog.LogValuer.
func (x *AssignedStorage) LogValue() slog.Value { return slog.StringValue(x.brief()) }

// Format implements fmt.Formatter, for all verbs.
func (x *AssignedStorage) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(x.brief())) }

func (x *AssignedStorage) brief() string {
	return x.GetMode().String() + " s3://" + x.GetBucket() + "/" + x.GetRoot() + "/" + x.GetPrefix() + " at " + x.GetEndpoint()
}

// LogValue implements slog.LogValuer.
func (x *Assignment) LogValue() slog.Value { return slog.StringValue(x.brief()) }

// Format implements fmt.Formatter, for all verbs.
func (x *Assignment) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(x.brief())) }

func (x *Assignment) brief() string {
	return x.GetSessionId() + " generation " + strconv.FormatInt(x.GetGeneration(), 10) + " " + x.GetDesiredState().String()
}
