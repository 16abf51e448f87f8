/* The generated network. Call understudy_classify of student.h, which checks its arguments. */
#ifndef STUDENT_NETWORK_H
#define STUDENT_NETWORK_H

void student_network_run(const float *pixels_chw, float *logits);

#endif
